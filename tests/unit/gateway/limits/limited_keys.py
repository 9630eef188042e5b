"""Keys with limits, for tests."""

from __future__ import annotations

from typing import Any

from gateway.tenants.keys import Key, digest_of


def limited(name: str = "a", token: str = "", **limits: Any) -> Key:
    return Key(**{"name": name, "tenant": "t", "sha256": digest_of((token or name).encode()).hex(), **limits})
