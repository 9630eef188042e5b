"""Ways to read KV out of another holder's memory, each checked after the copy (verification). A new source of KV is read here.

The seam is `base.Transport`. May import table and below.
"""
