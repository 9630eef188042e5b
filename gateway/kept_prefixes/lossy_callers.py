"""Callers where blocks are kept with loss."""

from __future__ import annotations

from gateway.kept_prefixes.prefix_reader import Callers
from gateway.tenants.tenants import TenantContext


class LossyCallers:
    """A tenant that accepts loss has its prefixes kept in the cache that its requests use, but for those that want exact KV."""

    def __init__(self, callers: Callers) -> None:
        self._callers = callers

    def named(self, name: str) -> TenantContext | None:
        """As the tenants'."""
        found = self._callers.named(name)
        return found.with_loss() if found is not None and found.accepts_loss else found

    @property
    def open(self) -> bool:
        """As the tenants'."""
        return self._callers.open
