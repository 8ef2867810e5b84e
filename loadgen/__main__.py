"""`python -m loadgen` and `penstock bench`."""

import os
import sys
from collections.abc import Sequence

from loadgen.commands.run import run


def main(argv: Sequence[str]) -> int:
    """Run the load generator with these flags; returns the exit code."""
    return run(argv, os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
