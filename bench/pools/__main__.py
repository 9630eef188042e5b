"""`python -m bench.pools`."""

import sys

from bench.pools.command import main

if __name__ == "__main__":
    sys.exit(main())
