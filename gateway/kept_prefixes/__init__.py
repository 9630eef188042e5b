"""Prefixes kept in replicas' caches on request (`POST /kv/prefixes`): the book of them, and the keeper that places and pins.

May import ledger and below; not relay.
"""
