"""Without settings for the garbage collector: Python's own thresholds, and nothing is frozen."""

from gateway.serve import memory

memory._spare_the_collector = lambda: None
