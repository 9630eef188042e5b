"""One digest over everything that changes the bytes of a KV block, and the names of what differs."""

from collections.abc import Mapping

import msgspec
import xxhash

DIGEST_BYTES = 16


def fingerprint_digest(fields: Mapping[str, str]) -> bytes:
    """Return 16 bytes that are equal exactly when all fields are (up to hash collisions)."""
    return xxhash.xxh3_128_digest(msgspec.json.encode(dict(sorted(fields.items()))))


def fingerprint_difference(ours: Mapping[str, str], theirs: Mapping[str, str]) -> tuple[str, ...]:
    """Return a sentence for each field that differs, such as `dtype: bfloat16 here, float32 there`."""
    names = sorted(set(ours) | set(theirs))
    return tuple(
        f"{name}: {ours.get(name, 'absent')} here, {theirs.get(name, 'absent')} there"
        for name in names
        if ours.get(name) != theirs.get(name)
    )
