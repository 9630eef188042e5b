"""A simulated fleet: how steering behaves with more replicas than are available. `python -m bench.simulate --help`."""
