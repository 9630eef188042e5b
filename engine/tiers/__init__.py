"""Inside vLLM: tiers below its KV cache, each one more holder of blocks beside the replica. So far there is host memory.

The host process keeps the memory and the table's lock (host_process/kept_memory.py), so both outlive the engine. The engine's
scheduler is the table's only writer (`host_memory`), its workers copy (`slot_writer`); a new engine goes on with what the last
one offered. What another tier of the node holds is not stored twice. Regions are of equal size and are empty after the host
process restarts; a flush misses the region of a replica that is being restarted. A disk would live here too.

May import transport.
"""
