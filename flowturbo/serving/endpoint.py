"""Where the orchestrator listens for streams, and for the word to stop. Standard library only."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

LENGTH_BYTES = 8  # before each message
DRAIN = "drain"
_POLL_S = 0.2


def endpoint(server: int) -> Path:
    """The socket of the orchestrator under the server with this process id."""
    return Path(tempfile.gettempdir()) / f"flowturbo_{os.getuid()}_{server}" / "socket"


def packed(content: object) -> bytes:
    """A message with its length before it."""
    body = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def drain(path: Path, give_up: Callable[[], bool]) -> None:
    """Lets the orchestrator at `path` take no more requests; waits until all are answered.

    Returns earlier if `give_up()`, and at once if nobody listens.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_POLL_S)
            connection.connect(str(path))
            connection.sendall(packed(DRAIN))
            while not give_up():
                try:
                    connection.recv(1)
                except TimeoutError:
                    continue
                return
    except OSError:
        return
