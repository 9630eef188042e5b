"""Comparisons of peerkv with other routers: each is one command; not part of the installed package."""
