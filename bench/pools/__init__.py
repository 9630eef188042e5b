"""One pool of host memory for all replicas, beside private pools of the same total: `python -m bench.pools --help`."""
