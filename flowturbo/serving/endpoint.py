"""Where the orchestrator listens for streams. Standard library only."""

import os
import tempfile
from pathlib import Path


def endpoint(server: int) -> Path:
    """The socket of the orchestrator under the server with this process id."""
    return Path(tempfile.gettempdir()) / f"flowturbo_{os.getuid()}_{server}" / "socket"
