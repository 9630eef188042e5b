"""`peerkv bench`: measures a running installation from the outside. installation.py speaks HTTP, most of the rest is pure."""
