"""Start, wiring and orderly shutdown of the process. Only this package knows all the parts. May import everything but cli."""
