"""Draining, resuming and restarting replicas on request, with what they hold handed over first.

May import kept_prefixes and below.
"""
