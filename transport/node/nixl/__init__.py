"""Blocks of other nodes by NIXL: one-sided reads out of their memory, by RDMA where there is any.

NIXL has no deadlines, and what it has begun cannot be taken back. So it runs in processes of its own, which the agent ends
where it has to: `process.py` keeps one, `child.py` is what runs there.
"""
