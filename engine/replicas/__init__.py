"""In the supervisor, the process of `peerkv serve` or `peerkv engine`: starts, watches and restarts replicas.

May import host_process and fleet.
"""
