"""Tenants: keys and salts."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import product

import pytest
from pydantic import SecretStr

from gateway.errors import NotAuthenticated
from gateway.settings import Tenant
from gateway.tenants.keys import Key, Keys, digest_of
from gateway.tenants.tenants import ANONYMOUS, HEADER_KEPT_BYTES_MAX, HEADERS_KEPT_MAX, Tenants, bearer_token
from transport.table.quality import lossy_salt

A = Tenant(name="a", api_key=SecretStr("key-number-1"))
B = Tenant(name="b", api_key=SecretStr("key-number-2"), salt=SecretStr("given"))


def test_without_tenants_everybody_is_the_anonymous_one_without_a_salt() -> None:
    assert Tenants([]).authenticate(b"Bearer whatever") is ANONYMOUS
    assert ANONYMOUS.salt == ""


def test_salts_differ_and_do_not_show_the_key() -> None:
    tenants = Tenants([A, Tenant(name="c", api_key=SecretStr("key-number-3"))])
    a, c = (tenants.authenticate(f"Bearer key-number-{i}".encode()) for i in (1, 3))
    assert a.salt != c.salt
    assert "key-number-1" not in a.salt


def test_a_salt_survives_a_restart() -> None:
    first, again = (Tenants([A], salt_secret=b"a secret of tests") for _ in range(2))
    assert first.authenticate(b"Bearer key-number-1") == again.authenticate(b"Bearer key-number-1")


def test_a_given_salt_is_used() -> None:
    assert Tenants([A, B]).authenticate(b"bearer  key-number-2").salt == "given"


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic key-number-1", b"key-number-1", b"Bearer x"])
def test_nobody_else_gets_in(header: bytes | None) -> None:
    with pytest.raises(NotAuthenticated):
        Tenants([A]).authenticate(header)


@pytest.mark.parametrize("given", ["s" * 512, "s" * 125, "c2FsdA/with@marks"])
def test_a_given_salt_that_vllm_would_refuse_is_used_as_a_digest(given: str) -> None:
    tenant = B.model_copy(update={"salt": SecretStr(given)})
    found = {Tenants([tenant]).authenticate(b"Bearer key-number-2").salt for _ in range(2)}
    salt = lossy_salt(found.pop())
    assert not found
    assert len(salt) <= 128
    assert not set("@/\\\0") & set(salt)


def test_the_admin_is_a_tenant_with_a_salt_of_its_own() -> None:
    tenants = Tenants([A], SecretStr("the-admin-key"))
    admin = tenants.authenticate(b"Bearer the-admin-key")
    assert admin.name == "admin"
    assert admin.salt not in ("", tenants.authenticate(b"Bearer key-number-1").salt)


def test_an_admin_key_alone_does_not_close_the_gateway() -> None:
    assert Tenants([], SecretStr("the-admin-key")).authenticate(None) is ANONYMOUS


def test_a_bearer_token_is_found_in_any_case() -> None:
    assert bearer_token(b"BEARER abc") == b"abc"


def keys(*found: Key) -> Keys:
    return Keys(salt_secret="ab" * 32, keys=found)


def of_file(token: str, name: str, tenant: str, **values: object) -> Key:
    return Key(name=name, tenant=tenant, sha256=digest_of(token.encode()).hex(), **values)


def test_who_accepts_loss_is_said_with_the_key_and_without_keys_the_operator_speaks_for_all() -> None:
    given = [A, Tenant(name="c", api_key=SecretStr("key-number-3"), accepts_loss=True)]
    tenants = Tenants(given, keys=keys(of_file("one", "x", "t"), of_file("two", "y", "t", accepts_loss=True)))
    sent = ("key-number-1", "key-number-3", "one", "two")
    found = [tenants.authenticate(f"Bearer {token}".encode()).accepts_loss for token in sent]
    assert found == [False, True, False, True]
    assert ANONYMOUS.accepts_loss
    assert [getattr(tenants.named(name), "accepts_loss", None) for name in ("a", "c", "t")] == [False, True, False]
    revoked = of_file("one", "x", "t", revoked=datetime(2026, 1, 1, tzinfo=UTC))
    tenants.use(keys(revoked, of_file("two", "y", "t", accepts_loss=True)))
    assert getattr(tenants.named("t"), "accepts_loss", None)


def test_no_salt_may_end_as_that_of_a_cache_of_what_lost_something() -> None:
    with pytest.raises(ValueError, match="who accept loss"):
        Tenant(name="d", api_key=SecretStr("key-number-4"), salt=SecretStr(lossy_salt("x")))


def test_keys_of_one_tenant_share_a_salt_that_a_new_key_does_not_change() -> None:
    tenants = Tenants([], keys=keys(of_file("one", "x", "t"), of_file("two", "y", "t"), of_file("three", "z", "u")))
    first, second, other = (tenants.authenticate(f"Bearer {token}".encode()) for token in ("one", "two", "three"))
    assert first.salt == second.salt != other.salt
    assert len(first.salt) == 64
    tenants.use(keys(of_file("four", "x", "t")))
    assert tenants.authenticate(b"Bearer four").salt == first.salt
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(b"Bearer one")
    assert tenants.named("t").salt == first.salt
    assert tenants.named("u") is None


def test_a_key_of_the_file_may_be_of_a_tenant_of_the_settings_and_shares_its_salt() -> None:
    tenants = Tenants([B], keys=keys(of_file("one", "x", "b")))
    assert tenants.authenticate(b"Bearer one").salt == "given"
    assert tenants.authenticate(b"Bearer key-number-2").salt == "given"


def test_keys_that_are_over_are_refused_with_the_reason() -> None:
    now = datetime(2027, 1, 1, tzinfo=UTC)
    tenants = Tenants(
        [],
        keys=keys(
            of_file("ended", "a", "t", expires=now),
            of_file("ends", "b", "t", expires=datetime(2027, 1, 2, tzinfo=UTC)),
            of_file("revoked", "c", "t", revoked=now),
            of_file("new", "d", "t", former_sha256=digest_of(b"old").hex(), former_expires=now),
        ),
        clock=now.timestamp,
    )
    for token, words in (("ended", "expired"), ("revoked", "revoked"), ("old", "expired"), ("never", "Incorrect")):
        with pytest.raises(NotAuthenticated, match=words):
            tenants.authenticate(f"Bearer {token}".encode())
    for token in ("ends", "new"):
        assert tenants.authenticate(f"Bearer {token}".encode()).name == "t"


def test_a_key_that_was_let_in_before_is_refused_as_soon_as_it_is_over() -> None:
    now = [datetime(2027, 1, 1, tzinfo=UTC)]
    given = of_file("one", "a", "t", expires=datetime(2027, 1, 2, tzinfo=UTC))
    tenants = Tenants([A], keys=keys(given), clock=lambda: now[0].timestamp())
    assert [tenants.authenticate(b"Bearer one").name for _ in range(2)] == ["t", "t"]
    now[0] = datetime(2027, 1, 3, tzinfo=UTC)
    with pytest.raises(NotAuthenticated, match="expired"):
        tenants.authenticate(b"Bearer one")
    now[0] = datetime(2027, 1, 1, tzinfo=UTC)
    tenants.use(keys(of_file("one", "a", "t", revoked=now[0])))
    with pytest.raises(NotAuthenticated, match="revoked"):
        tenants.authenticate(b"Bearer one")
    tenants.use(keys())
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(b"Bearer one")
    assert tenants.authenticate(b"Bearer key-number-1").name == "a"
    tenants.configure([B], None)
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(b"Bearer key-number-1")


def test_a_key_that_was_let_in_before_gets_in_among_more_headers_than_are_kept() -> None:
    tenants = Tenants([A], keys=keys(of_file("one", "a", "t")))
    schemes = ["".join(letters) for letters in product(*zip("bearer", "BEARER", strict=True))]
    for spaces in (*range(HEADERS_KEPT_MAX // len(schemes) + 1), HEADER_KEPT_BYTES_MAX):
        for scheme in schemes:
            assert tenants.authenticate(f"{scheme} {' ' * spaces}one".encode()).name == "t"
            with pytest.raises(NotAuthenticated):
                tenants.authenticate(f"{scheme} {' ' * spaces}two".encode())
    assert tenants.authenticate(b"Bearer key-number-1").name == "a"


def test_with_a_keys_file_nobody_calls_without_a_key_even_if_it_is_empty() -> None:
    tenants = Tenants([], SecretStr("the-admin-key"), keys=keys())
    assert not tenants.open
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(None)
    assert tenants.authenticate(b"Bearer the-admin-key").name == "admin"


def test_those_who_have_caches_of_their_own_are_counted_once_each() -> None:
    now = datetime(2027, 1, 1, tzinfo=UTC)
    assert len(Tenants([])) == 0
    found = [of_file("1", "a", "t"), of_file("2", "b", "t"), of_file("3", "c", "u"), of_file("4", "d", "gone", revoked=now)]
    tenants = Tenants([], keys=keys(*found))
    assert len(tenants) == 2
    tenants.use(keys(*found, of_file("5", "e", "v", group="g"), of_file("6", "f", "w", group="g")))
    assert len(tenants) == 3
    tenants.configure([], SecretStr("the-admin-key"))
    assert len(tenants) == 4
