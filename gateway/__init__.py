"""The front door: an OpenAI-compatible gateway that steers requests by who holds which prefix."""

__version__ = "0.1.0"
