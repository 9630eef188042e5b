"""Going on with a stream whose engine died, on another replica, from the tokens that were sent. Pure: no socket, no clock.

`terms` says which requests can be continued exactly, `tape` remembers what a stream has sent. `rest` turns another engine's
events into the rest of it: `resumed` where that engine goes on behind the tokens, `parsed` where it makes the whole anew. May
import ledger and below.
"""
