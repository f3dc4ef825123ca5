"""`python -m flowturbo_client` is the command `flowturbo-client`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
