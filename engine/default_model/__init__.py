"""The default model, fetched and converted once, in a process of its own: `python -m engine.default_model`.

May import host_process and fleet.
"""
