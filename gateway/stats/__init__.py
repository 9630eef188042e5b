"""Every figure that is shown: shapes, the snapshot for `/kv/stats`, Prometheus metrics, the explanation of one request.

May import kept_prefixes, relay and below.
"""
