"""What can be wrong with a frame. Every one of them is a miss: the block is computed."""

from transport.errors import TransportError


class FrameError(TransportError):
    """Base of this folder's errors."""


class FrameDamaged(FrameError):
    """The bytes are not a whole frame as it was written: remove it."""


class FrameNotRead(FrameError):
    """It is of a version or a codec that this release does not read: leave it to the release that wrote it."""


class ForeignFrame(FrameError):
    """It is whole, but of another model, key, KV cache group or shape than asked for: look nowhere else for the block here."""


class FrameLocked(FrameError):
    """It is encrypted and the key is absent or another, or it was to be encrypted and is not."""


class NotCoded(FrameError):
    """The codec does not take this block (states, quantised caches, values that are not finite): store it with `raw-z`."""
