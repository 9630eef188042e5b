"""`peerkv bench`: a running installation measured from outside; installation.py speaks HTTP, most of the rest is pure."""
