"""Which replica gets a request and where it imports from. Pure: no clock, task, socket or log; `now` is handed in.

`scoring` adds up the terms. A new term is a module here (`evictions` is an example); what it fits online goes into `costs`.
"""
