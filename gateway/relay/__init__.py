"""The data plane: a request in, a replica chosen, its answer out; retries. May import ledger and below, and http_server.

The seam is `interfaces`: what the relay asks of planner and ledger.
"""
