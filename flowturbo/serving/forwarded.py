"""Request parameters that are not the caller's: forwarded headers, and the order of outputs.

With `--http-header-forward-pattern` or `--grpc-header-forward-pattern` the server hands headers
(for tracing, say, or authentication) to models as request parameters. Nothing but their names tells
them from others. So the flags are read off the server's own command line.

The server keeps the outputs that are asked for as a set. Where server_guard.c stands before it, a
number for each says in which order they were named.
"""

import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowturbo.errors import RequestError

# The server's flags, and the shortest words that it takes for them.
_FLAGS = {
    "--http-header-forward-pattern": "--http-h",
    "--grpc-header-forward-pattern": "--grpc-he",
}
_SERVER = "tritonserver"
_ASKED = "flowturbo_output_"  # and the output's name: server_guard.c
_logger = logging.getLogger(__name__)


class Forwarded:
    """Whether a parameter is a header that the server forwards."""

    def __init__(self, patterns: Sequence[str]) -> None:
        self._patterns = [_compiled(pattern) for pattern in patterns]

    @classmethod
    def by_server(cls, process: int, proc: Path = Path("/proc")) -> "Forwarded":
        """As the server above the process of this id says; nothing where there is none."""
        return cls(find_patterns(_server_arguments(process, proc)))

    def check(self, parameters: Callable[[], str]) -> dict[str, Any]:
        """The parameters of a request; raises RequestError for one that is its caller's own.

        `parameters` gives them as a JSON object, "" if there are none. Headers may have values that
        are no text.
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
        # The server's own search (RE2's PartialMatch) finds a pattern anywhere in a name.
        return any(pattern.search(name) for pattern in self._patterns)


def as_asked(names: Iterable[str], parameters: Mapping[str, Any]) -> list[str]:
    """The outputs `names` in the order asked for, where the `parameters` tell it, else as given."""
    return sorted(names, key=lambda name: parameters.get(f"{_ASKED}{name}", 0))


def find_patterns(arguments: Sequence[str]) -> list[str]:
    """The patterns in a server's command line, given as `--flag=pattern` or `--flag pattern`.

    An empty one is a pattern too, which every header has.
    """
    found = []
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        flag, given, pattern = word.partition("=")
        if any(full.startswith(flag) and flag.startswith(low) for full, low in _FLAGS.items()):
            value = pattern if given else following
            found += [value] if value is not None else []
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    # The server's syntax (RE2) has a little that Python's lacks, or reads as something else.
    try:
        if "[:" in pattern:
            raise re.error("a class of characters by name")
        return re.compile(pattern)
    except re.error as error:
        _logger.warning(
            "header pattern %r cannot be read (%s): any parameter passes", pattern, error
        )
        return re.compile("")


def _server_arguments(process: int, proc: Path) -> list[str]:
    """The command line of the nearest process above `process` that is a server."""
    while process > 0:  # the server is process 1 of a container that starts with it
        try:
            words = (proc / str(process) / "cmdline").read_bytes().split(b"\0")
            # "pid (name) state parent ...": proc(5)
            parent = (proc / str(process) / "stat").read_text().rpartition(")")[2].split()[1]
        except (OSError, IndexError):
            return []
        if Path(words[0].decode(errors="replace")).name == _SERVER:
            return [word.decode(errors="replace") for word in words[:-1]]  # each ends with a 0
        process = int(parent)
    return []
