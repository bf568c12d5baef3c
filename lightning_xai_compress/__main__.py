"""`python -m lightning_xai_compress`: export, inspect and verify files without training."""

import sys

from lightning_xai_compress.commands import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
