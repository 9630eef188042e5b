"""Ids of Responses, by which the replica that keeps one is found again, and only by the tenant that it was made for. Pure.

vLLM keeps a response in the memory of the one replica that made it, if at all (VLLM_ENABLE_RESPONSES_API_STORE=1). Its id is
ours to choose: random, and behind that a code over the replica's name, keyed with whose it is. So nothing has to be
remembered here, any gateway of the fleet can tell, and another tenant's ids mean nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterable

from gateway.errors import UnknownResponse
from gateway.tenants.tenants import TenantContext

_PREFIX = "resp_"
_RANDOM_BYTES = 16
_CODE_DIGITS = 32


def owner_of(tenant: TenantContext) -> str:
    """Whose a response is, as nobody else can name it: tenants of a group have the same salt."""
    return f"{tenant.salt}\0{tenant.name}"


def new_id(owner: str, replica: str) -> str:
    """An id for a response that this replica is about to make for that owner."""
    chance = os.urandom(_RANDOM_BYTES).hex()
    return _PREFIX + chance + _code(owner, chance, replica)


def keeper(id: str, owner: str, replicas: Iterable[str]) -> str | None:
    """Which of the replicas a response was made on, None if on none of them, or for another owner."""
    chance, code = id[len(_PREFIX) : -_CODE_DIGITS], id[-_CODE_DIGITS:].encode("utf-8", "surrogatepass")
    if not id.startswith(_PREFIX) or len(chance) != 2 * _RANDOM_BYTES or not chance.isascii():
        return None
    return next((name for name in replicas if hmac.compare_digest(_code(owner, chance, name).encode(), code)), None)


def wanted_keeper(id: str, owner: str, replicas: Iterable[str], wanted: str | None) -> str:
    """As `keeper`. Raises UnknownResponse for None, and when the request names another replica as `wanted`."""
    found = keeper(id, owner, replicas)
    if found is None or wanted not in (None, found):
        raise UnknownResponse(id)
    return found


def _code(owner: str, chance: str, replica: str) -> str:
    return hmac.new(owner.encode(), f"{chance} {replica}".encode(), hashlib.sha256).hexdigest()[:_CODE_DIGITS]
