"""`python -m deepen` is `deepen`."""

import sys

from deepen.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
