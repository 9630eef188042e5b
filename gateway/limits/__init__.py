"""How much the holder of a key may use: reserved before a request is served, settled after. May import tenants and below.

Pure but for limiter.py, which has the clock, and the state's file.
"""
