"""The process that owns the replicas (`python -m engine.host_process`), its messages, logs and directories.

A child of the supervisor: on the CPU it imports vLLM once and forks the replicas, on GPUs it starts one vLLM server each. Knows
neither connector nor supervisor. May import fleet.
"""
