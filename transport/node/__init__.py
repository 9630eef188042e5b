"""Between nodes: what agents say to each other, mirrors of another node's block tables, and the bytes of its blocks.

Everything here is for the agents of nodes (`engine.node`) and for the engine's worker, which fetches through its own agent.
"""
