"""Block keys, block tables in shared memory (`table`), and one-sided reads of another holder's KV (`backends`).

Codecs, which put blocks into other bytes, are in `frames`. Not there yet, with a place in the layers (pyproject.toml): `node`,
bytes to and from other nodes. Knows neither gateway nor engine.
"""
