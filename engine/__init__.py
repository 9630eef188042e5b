"""The replicas: stock vLLM servers, what runs inside them, and what supervises them. Each folder runs in one kind of process.

- `replicas`: in the supervisor, the process of `peerkv serve` or `peerkv engine`; `fleet` is what the gateway sees of it
- `host_process`: in a child of the supervisor, which owns the vLLM servers and the memory of tiers
- `frame_tiers`: disk and vault, in a process of their own that the host starts
- `connector`, `tiers`: inside vLLM, in the engine's core process and its workers
- `default_model`: in a process of its own, once, before the first start
"""
