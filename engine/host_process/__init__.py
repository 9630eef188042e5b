"""The process that owns the replicas (`python -m engine.host_process`), its messages, logs and directories.

Runs as a child of the supervisor; knows neither connector nor supervisor. May import fleet.
"""
