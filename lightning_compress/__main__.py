"""``python -m lightning_compress`` is the command."""

import sys

from lightning_compress.cli import main

if __name__ == "__main__":
    sys.exit(main())
