"""Text files that people write, on whatever system."""

import json
import reprlib
from pathlib import Path
from typing import Any

from flowturbo.errors import FlowTurboError

# Of every width: Unicode's kind Zs, tabs, and what stands before a newline.
_BLANKS = " \t\r\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class TextFileError(FlowTurboError):
    """A text file cannot be read as such: the message names it and what is allowed."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark; raises TextFileError."""
    try:
        # Bytes, since reading as text would turn every kind of line end into a newline.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextFileError(f"{path} must be UTF-8 text: {error}") from error
    if "\0" in text:
        raise TextFileError(f"{path} must be UTF-8 text, it has NUL characters")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; raises TextFileError."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TextFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TextFileError(f"{path} must be an object, got {reprlib.repr(found)}")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without the blanks behind them and empty lines at the end.

    Lines end at newlines alone (perhaps after a carriage return): other characters that Unicode
    counts as line ends may stand in a name. Raises TextFileError.
    """
    lines = [line.rstrip(_BLANKS) for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
