"""`python -m server.cli` is the command `lightwell`."""

import sys

from server.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
