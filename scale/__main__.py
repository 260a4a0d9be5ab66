"""``python -m scale``: the command line for torchrun and for a checkout that is not installed."""

import sys

from scale.cli import main

# the guard matters: saving a checkpoint starts processes that import the main script again
if __name__ == "__main__":
    sys.exit(main())
