"""Block keys, block tables in shared memory, and one-sided reads of another replica's KV cache."""
