"""AES-GCM over a payload. `secret` is a tenant's key of 16, 24 or 32 random bytes; the extra `encryption`.

Nonces are random: with one key, write at most 2^32 frames (NIST SP 800-38D, 8.3).
"""

import os

from transport.frames.errors import FrameLocked

NONCE_BYTES = 12
TAG_BYTES = 16
EXTRA_BYTES = NONCE_BYTES + TAG_BYTES


def seal(payload: bytes | memoryview, secret: bytes, header: bytes) -> bytes:
    """Return nonce, ciphertext and tag; `header` is authenticated with them."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(secret).encrypt(nonce, bytes(payload), header)


def unseal(sealed: memoryview, secret: bytes, header: bytes) -> memoryview:
    """Return the payload. Raises FrameLocked if it was sealed with another key, or changed."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    if len(sealed) < EXTRA_BYTES:
        raise FrameLocked(f"{len(sealed)} encrypted bytes, less than {EXTRA_BYTES}")
    try:
        return memoryview(AESGCM(secret).decrypt(bytes(sealed[:NONCE_BYTES]), bytes(sealed[NONCE_BYTES:]), header))
    except InvalidTag as error:
        raise FrameLocked("a frame encrypted with another key") from error
