"""The block table in shared memory: its layout, its one writer, its readers; and the deliveries that travel beside it.

May import keys, fingerprint, hint and groups.
"""
