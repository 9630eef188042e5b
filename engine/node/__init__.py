"""A node's agent: one process that tells other nodes of this node's block tables, and brings theirs here.

Engines do nothing for it and know nothing of other nodes: it reads tables and memory that are shared anyway. If it dies, the
node goes on alone. `peerkv serve` and `peerkv engine` start it when they are told of other nodes.
"""
