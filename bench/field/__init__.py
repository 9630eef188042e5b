"""Two real vLLM replicas behind peerkv and behind other routers: `python -m bench.field --help`."""
