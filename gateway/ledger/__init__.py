"""For each attempt: what was expected of the caches, what was delivered, and the reason of a miss.

May import planner and below.
"""
