"""The admin side of the front door: health, `/kv/*`, `/metrics` and the OpenAPI document, served by FastAPI.

May import everything below it: stats, relay, kept_prefixes and down.
"""
