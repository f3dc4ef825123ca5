"""Request parameters that do not come from the caller: forwarded headers, and the output order.

With `--http-header-forward-pattern` or `--grpc-header-forward-pattern` the server passes headers
(for example for tracing or authentication) to models as request parameters. Only their names
distinguish them from the caller's parameters. So the patterns are read from the server's command
line.

The server keeps the requested outputs as a set, without their order. server_guard.c, if it is
loaded, adds a parameter per output with its position.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowturbo.contract import CALLER_HEADER
from flowturbo.errors import RequestError

# The server's flags, and the shortest abbreviations that it accepts.
_FLAGS = {
    "--http-header-forward-pattern": "--http-h",
    "--grpc-header-forward-pattern": "--grpc-he",
}
_SERVER = "tritonserver"
_MOST_LETTERS = 100  # of a caller's name
_ASKED = "flowturbo_output_"  # followed by the output's name: see server_guard.c
_logger = logging.getLogger(__name__)


class Forwarded:
    """Knows which request parameters are headers that the server forwards."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_compiled(pattern) for pattern in patterns]

    @classmethod
    def by_server(cls, process: int, proc: Path = Path("/proc")) -> "Forwarded":
        """With the patterns of the server above the process of this id; none without a server."""
        return cls(find_patterns(_server_arguments(process, proc)))

    def check(self, parameters: Callable[[], str]) -> dict[str, Any]:
        """The parameters of a request. Raises RequestError for one that the caller set.

        `parameters` returns them as a JSON object, or "" if there are none. Header values may be
        invalid UTF-8.
        """
        try:
            text = parameters()
        except UnicodeDecodeError as error:
            text = error.object.decode(errors="replace")
        stated: dict[str, Any] = json.loads(text or "{}", strict=False)
        if own := [name for name in sorted(stated) if not self._passes(name, stated[name])]:
            raise RequestError(
                f"unknown request parameter {own[0]!r}, none is allowed: "
                "settings of a request are input tensors"
            )
        return stated

    def _passes(self, name: str, value: Any) -> bool:
        return name in self or name.startswith(_ASKED) and isinstance(value, int)

    def __contains__(self, name: str) -> bool:
        # search(), because the server (RE2's PartialMatch) finds a pattern anywhere in a name.
        return any(pattern.search(name) for pattern in self._patterns)


def caller_of(parameters: Mapping[str, Any]) -> str:
    """The caller's name in the header CALLER_HEADER, if the server forwards it; else empty."""
    found = (of for name, of in parameters.items() if name.lower() == CALLER_HEADER)
    return str(next(found, ""))[:_MOST_LETTERS]


def as_asked(names: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """The outputs `names` in the requested order if the `parameters` have it, else as given."""
    return sorted(names, key=lambda name: parameters.get(f"{_ASKED}{name}", 0))


def find_patterns(arguments: Sequence[str]) -> list[str]:
    """The patterns in a server's command line, given as `--flag=pattern` or `--flag pattern`.

    An empty pattern counts too: it matches every header.
    """
    found = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, given, pattern = word.partition("=")
        if any(full.startswith(flag) and flag.startswith(low) for full, low in _FLAGS.items()):
            value = pattern if given else following
            found += [value] if value is not None else []
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    # A few constructs of the server's syntax (RE2) are missing or different in Python.
    try:
        if "[:" in pattern:
            raise re.error("a named character class")
        return re.compile(pattern)
    except re.error as error:
        _logger.warning(
            "header pattern %r cannot be parsed (%s): accepting every parameter", pattern, error
        )
        return re.compile("")


def _server_arguments(process: int, proc: Path) -> list[str]:
    """The command line of the nearest server among `process` and its ancestors."""
    while process > 0:  # includes process 1, which may be the server in a container
        try:
            words = (proc / str(process) / "cmdline").read_bytes().split(b"\0")
            # "pid (name) state parent ...": proc(5)
            parent = (proc / str(process) / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            return []
        if Path(words[0].decode(errors="replace")).name == _SERVER:
            return [word.decode(errors="replace") for word in words[:-1]]  # each word ends with a 0
        process = int(parent)
    return []
