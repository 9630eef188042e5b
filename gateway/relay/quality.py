"""Whether a request takes KV that lost something: its caller must accept that, and x-peerkv-quality can refuse it."""

from __future__ import annotations

from collections.abc import Callable

from gateway.errors import InvalidRequest
from gateway.http_server.transaction import Transaction
from gateway.tenants.tenants import TenantContext

_LOSSY_LINE = b"x-peerkv-quality: lossy\r\n"


def with_quality(tenant: TenantContext, transaction: Transaction) -> TenantContext:
    """Return the caller with the salt of the cache that its request may use; if it is the lossy one, the answer says so.

    Raises InvalidRequest for another quality than exact and lossy.
    """
    wanted = transaction.fields.quality
    if wanted not in (None, b"exact", b"lossy"):
        raise InvalidRequest("The header 'x-peerkv-quality' must be exact or lossy.", code="invalid_quality")
    if wanted == b"exact" or not tenant.accepts_loss:
        return tenant
    transaction.more_lines = _with_line(transaction, transaction.more_lines)
    return tenant.with_loss()


def _with_line(transaction: Transaction, others: Callable[[], bytes] | None) -> Callable[[], bytes]:
    """An error says nothing of KV: there was none in it."""
    return lambda: (_LOSSY_LINE if transaction.status < 400 else b"") + (b"" if others is None else others())
