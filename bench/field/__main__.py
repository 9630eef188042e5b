"""`python -m bench.field`."""

import sys

from bench.field.command import main

if __name__ == "__main__":
    sys.exit(main())
