"""``python -m fisherops``."""

import sys

from fisherops.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
