"""`python analyze.py ...` is `harmonize analyze ...`."""

import sys

from harmonize.cli import main

if __name__ == "__main__":
    sys.exit(main(["analyze", *sys.argv[1:]]))
