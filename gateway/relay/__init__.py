"""The data plane: a request in, a replica chosen, its answer out; retries. May import ledger and below, and http_server.

The seam is `interfaces`: what the relay asks of planner and ledger. Going on elsewhere with a stream whose engine died belongs
in a package of its own below this one, `continuation`, which is not there yet.
"""
