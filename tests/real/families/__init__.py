"""Engines of tiny models, one a family of KV caches, stepped by hand: no gateway, no server."""
