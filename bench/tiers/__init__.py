"""Figures of disk and vault: `python -m bench.tiers stores`, `python -m bench.tiers restore`."""
