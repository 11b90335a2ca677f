"""`python evaluate.py ...` is `harmonize evaluate ...`."""

import sys

from harmonize.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
