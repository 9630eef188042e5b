"""Start, wiring and orderly end of the process; nothing else knows all the parts. May import everything but cli."""
