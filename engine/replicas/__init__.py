"""The supervisor's side: starts, watches and restarts replicas. Runs in the process of `peerkv serve` or `peerkv engine`.

May import host_process and fleet.
"""
