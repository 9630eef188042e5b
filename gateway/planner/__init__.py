"""From a request to a plan: prompts, block_registry and steering put together, and the hint that tells the engine.

May import prompts, steering, block_registry, upstream and below.
"""
