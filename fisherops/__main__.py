"""``python -m fisherops``."""

import sys

from fisherops.cli import main

if __name__ == "__main__":
    sys.exit(main())
