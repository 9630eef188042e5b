"""The page at /ui: what /kv/stats, /kv/prefixes and /kv/explain say, at a glance. Its files are in `page/`.

May import admin and below.
"""
