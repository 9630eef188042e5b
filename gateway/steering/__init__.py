"""Which replica gets a request and where it imports from. Pure: no clock, task, socket or log; `now` is handed in."""
