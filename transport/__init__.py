"""Block keys, block tables in shared memory (`table`), and one-sided reads of another holder's KV (`backends`).

Not there yet, with a place in the layers (pyproject.toml): `frames`, codecs that put blocks into other bytes, and `node`, bytes
to and from other nodes. Knows neither gateway nor engine.
"""
