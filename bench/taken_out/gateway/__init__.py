"""Mechanisms of the running gateway, each taken out by one file: `python -m bench.routers --arms "peerkv,peerkv -heads"`."""
