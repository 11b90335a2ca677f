"""`python train.py ...` is `harmonize train ...`."""

import sys

from harmonize.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
