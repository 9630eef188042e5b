"""The data plane: a request in, a replica chosen, its answer out; retries. May import ledger and below, and http_server.

The seam is `interfaces`: what the relay asks of planner and ledger. `going_on` has another replica go on with a stream
whose engine died, by what `continuation` below this package keeps of it.
"""
