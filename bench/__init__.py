"""Comparisons of peerkv with other routers: one command each, not part of the installed package."""
