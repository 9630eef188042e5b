"""`python -m bench.pools.server …`: bench.tcp_beside_unix with bench.pools.connector in place of our connector."""

import runpy
import sys

OURS, PLACE = '"kv_connector_module_path":"engine.connector"', '"kv_connector_module_path":"bench.pools.connector"'

if __name__ == "__main__":
    at = sys.argv.index("--kv-transfer-config") + 1
    if OURS not in sys.argv[at]:
        sys.exit(f"no {OURS} in {sys.argv[at]}")
    sys.argv[at] = sys.argv[at].replace(OURS, PLACE)
    runpy.run_module("bench.tcp_beside_unix", run_name="__main__", alter_sys=True)
