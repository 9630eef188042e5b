"""`python -m bench.taken_out.gateway NAME ARGUMENTS`: `peerkv ARGUMENTS` without the mechanism that NAME.py takes out."""

import sys
from importlib import import_module

from gateway.cli.main import main

if __name__ == "__main__":
    import_module(f"bench.taken_out.gateway.{sys.argv[1]}")
    sys.exit(main(sys.argv[2:]))
