"""Without settings for malloc: large bodies' memory goes back to the kernel each time."""

from gateway.serve import memory

memory._keep_freed_memory = lambda: None
