"""Ways to copy blocks out of another replica's memory, each checked after the copy (verification).

The seam is `base.Transport`. May import table and below.
"""
