"""Tiers that keep frames below host memory: a directory on a disk, and a vault, a Valkey server for several nodes.

They belong to one process a node (`python -m engine.frame_tiers`), a child of the replica host, so that no engine waits for a
disk or a network. Down: `demotion` copies what the engines stored in host memory, by the table protocol, and writes it as
frames. Up: the gateway asks over a socket (`client`, `service`) for the chain of a prompt; `promotion` reads the frames, checks
them and puts the blocks into memory of this process (`staging`), under a table from which engines import as from any other.

`store` is the seam, with two implementations: `disk` and `vault`. May import transport, tiers and host_process.
"""
