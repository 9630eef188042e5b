"""A simulated fleet: what steering does on more replicas than there are at hand. `python -m bench.simulate --help`."""
