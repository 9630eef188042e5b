"""The front door: an OpenAI-compatible gateway that steers requests by who holds which prefix.

One folder for each noun, in layers (pyproject.toml): ARCHITECTURE.md has the life of a request and the map. Not there yet, with
a place in the layers: `continuation`, which goes on with a stream whose engine died.
"""

__version__ = "0.1.0"
