"""Shared code of the commands: numbers as options, and errors on one line."""

import argparse
import re
import sys
from collections.abc import Callable


def run_command(
    name: str, work: Callable[[], object], errors: tuple[type[BaseException], ...]
) -> int:
    """Returns the exit status of `work`: 0, or 2 after one of `errors`, printed on one line.

    `errors` are errors that the user can fix. Other errors are bugs and end with a traceback.
    """
    try:
        work()
    except errors as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0


def natural(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if not natural(text):
        raise argparse.ArgumentTypeError("must be at least 1, got 0")
    return int(text)


class integer:
    """An argparse type: an integer within bounds (inclusive)."""

    def __init__(self, low: int, high: int) -> None:
        self._low, self._high = low, high

    def __call__(self, text: str) -> int:
        if not text.isdecimal() or not self._low <= int(text) <= self._high:
            allowed = f"an integer from {self._low} to {self._high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed}")
        return int(text)


def image_size(text: str) -> tuple[int, int]:
    """An argparse type: WIDTHxHEIGHT in pixels, as (H, W)."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if not found:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT, such as 1024x768, got {text!r}")
    return int(found[2]), int(found[1])
