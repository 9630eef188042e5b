"""Where blocks may be kept with loss, prefixes are kept where requests look for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from gateway.kept_prefixes.lossy_callers import LossyCallers
from gateway.relay.quality import with_quality
from gateway.settings import Tenant
from gateway.tenants.tenants import Tenants

KEY = b"Bearer key-number-1"


@pytest.mark.parametrize(
    "given",
    [
        [],
        [Tenant(name="t", api_key=SecretStr("key-number-1"), accepts_loss=True)],
        [Tenant(name="t", api_key=SecretStr("key-number-1"))],
    ],
    ids=["nobody needs a key", "who accepts loss", "who does not"],
)
def test_a_prefix_is_kept_in_the_cache_that_requests_of_its_tenant_use(given: list[Tenant]) -> None:
    transaction: Any = SimpleNamespace(fields=SimpleNamespace(quality=None), more_lines=None)
    tenants = Tenants(given, make_secret=lambda: bytes(32))
    caller = tenants.authenticate(KEY)
    kept = LossyCallers(tenants).named(caller.name)
    assert kept is not None
    assert kept.salt == with_quality(caller, transaction).salt


def test_a_tenant_that_does_not_exist_has_no_cache() -> None:
    callers = LossyCallers(Tenants([Tenant(name="t", api_key=SecretStr("key-number-1"), accepts_loss=True)]))
    assert callers.named("nobody") is None
    assert not callers.open
