"""``python -m harmonize ...`` is ``harmonize ...``."""

import sys

from harmonize.cli import main

if __name__ == "__main__":
    sys.exit(main())
