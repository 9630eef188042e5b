"""Limits that several gateways share, counted in a Valkey server.

`account.lua` is one account's arithmetic, run by the server in one step and by its clock. `commands` says what is sent for it
and what an answer means, `shared_book` what is sent when, and what is sent again; both are pure. `line` and `shared_limits` do
the I/O.
"""
