"""Reads text and JSON files that people write on any operating system."""

import json
import reprlib
from pathlib import Path
from typing import Any

from flowturbo.errors import FlowTurboError

# Blanks of every width: Unicode category Zs, tabs, and carriage returns.
_BLANKS = " \t\r\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


class TextFileError(FlowTurboError):
    """A text file has invalid content: the message names the file and what is allowed."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises TextFileError."""
    try:
        # Bytes, because read_text() would turn every kind of line end into a newline.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextFileError(f"{path} must be UTF-8 text: {error}") from error
    if "\0" in text:
        raise TextFileError(f"{path} must be UTF-8 text, it has NUL characters")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises TextFileError."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise TextFileError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TextFileError(f"{path} must be an object, got {reprlib.repr(found)}")
    return found


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without trailing blanks and without empty lines at the end.

    Only a newline ends a line (with or without a carriage return). Other Unicode line ends may be
    part of a name. Raises TextFileError.
    """
    lines = [line.rstrip(_BLANKS) for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
