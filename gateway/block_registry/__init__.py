"""Who holds which blocks: the block tables of all replicas, key chains, and what engines report as delivered.

The seam is `tables.Tables`: where tables come from. May import token_ids.
"""
