"""Who is an admin without a key, and who may use the model where nobody needs one."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from gateway.errors import Forbidden, NotAuthenticated
from gateway.settings import Settings, Tenant
from gateway.tenants.access import AdminAccess, caller, open_to_others
from gateway.tenants.loopback import is_loopback, is_loopback_url
from gateway.tenants.tenants import ANONYMOUS, Tenants

A = Tenant(name="a", api_key=SecretStr("key-number-1"))
LOCAL_HOSTS = (b"localhost:8000", b"LOCALHOST", b"127.0.0.1", b"127.8.8.8:80", b"[::1]:8000", b"[::ffff:127.0.0.1]")
FOREIGN_HOSTS = (
    *(b"evil.example:8000", b"localhost.evil.example", b"127.0.0.1.evil.example", b"localhost:8000@evil.example"),
    *(b"", b" ", b":8000", b"10.0.0.1:8000", b"0.0.0.0", b"192.168.0.1", b"[::]", b"[fe80::1]", b"[::1", b"::1", b"2130706433"),
    *(b"localhost, evil.example", b"localhost/", b"localhost\xff", b"localhost.", b"127.1"),
)


def scope(client: str | None = "127.0.0.1", *hosts: bytes, version: str = "1.1", **headers: str) -> dict[str, Any]:
    given = hosts or (b"localhost:8000",)
    raw = [(b"host", host) for host in given]
    raw += [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"client": None if client is None else (client, 1), "headers": raw, "http_version": version}


@pytest.mark.parametrize("client", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", LOCAL_HOSTS)
def test_without_a_key_a_caller_on_this_machine_is_an_admin(client: str, host: bytes) -> None:
    AdminAccess(None).check(scope(client, host))


@pytest.mark.parametrize("client", ["10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "", "localhost", None])
def test_without_a_key_nobody_else_is(client: str | None) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(client))


@pytest.mark.parametrize(
    "header",
    [
        *("x_forwarded_for", "x_forwarded_host", "x_forwarded_proto", "x_forwarded_port", "x_forwarded_anything", "forwarded"),
        *("via", "x_real_ip", "x_client_ip", "true_client_ip", "x_cluster_client_ip", "x_original_forwarded_for"),
        *("cf_ray", "cf_connecting_ip", "cf_visitor", "cdn_loop", "fastly_client_ip", "x_envoy_external_address"),
        *("proxy_connection", "x_amzn_trace_id", "origin", "sec_fetch_site"),
    ],
)
def test_a_proxy_or_a_web_page_on_this_machine_is_not_an_admin(header: str) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(**{header: "127.0.0.1"}))


@pytest.mark.parametrize("site", ["same-origin", "none"])
def test_our_own_page_and_what_a_browsers_user_typed_are_let_in(site: str) -> None:
    AdminAccess(None).check(scope(sec_fetch_site=site))


@pytest.mark.parametrize("site", ["cross-site", "same-site", "", "same-origin, none"])
def test_a_page_of_others_is_not(site: str) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(sec_fetch_site=site))


def test_a_page_of_others_whose_name_was_made_to_point_here_is_not() -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope("127.0.0.1", b"evil.example:8000", sec_fetch_site="same-origin"))


def test_our_own_page_changes_nothing() -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(sec_fetch_site="same-origin", origin="http://localhost:8000"))


def test_the_page_that_asks_for_the_key_is_anybodys_and_without_a_key_it_is_this_machines() -> None:
    AdminAccess(SecretStr("the-admin-key")).check_page(scope("10.0.0.1", b"any.example"))
    AdminAccess(None).check_page(scope(sec_fetch_site="none"))
    AdminAccess(None).check_page(scope(sec_fetch_site="same-origin", origin="http://localhost:8000"))
    for given in (scope("10.0.0.1"), scope(sec_fetch_site="cross-site"), scope("127.0.0.1", b"evil.example")):
        with pytest.raises(Forbidden):
            AdminAccess(None).check_page(given)


def test_who_speaks_http_1_0_is_a_proxy() -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope(version="1.0"))


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_without_a_key_the_host_has_to_be_localhost_or_a_loopback_address(host: bytes) -> None:
    with pytest.raises(Forbidden):
        AdminAccess(None).check(scope("127.0.0.1", host))


def test_a_missing_host_or_two_of_them_are_not_enough() -> None:
    without = scope()
    without["headers"] = []
    for each in (without, scope("127.0.0.1", b"localhost", b"evil.example"), scope("127.0.0.1", b"localhost", b"localhost")):
        with pytest.raises(Forbidden):
            AdminAccess(None).check(each)


def test_with_a_key_only_the_key_counts() -> None:
    access = AdminAccess(SecretStr("the-admin-key"))
    access.check(scope("10.0.0.1", b"any.example", authorization="Bearer the-admin-key", x_forwarded_for="1.2.3.4"))
    for headers in ({}, {"authorization": "Bearer the-admin-ke"}, {"x_forwarded_for": "127.0.0.1"}):
        with pytest.raises(NotAuthenticated):
            access.check(scope(**headers))


@pytest.mark.parametrize("host", [*FOREIGN_HOSTS, None])
def test_where_nobody_needs_a_key_a_name_made_to_point_here_does_not_get_the_model(host: bytes | None) -> None:
    with pytest.raises(Forbidden):
        caller(Tenants([]), scope(), None, host)


@pytest.mark.parametrize("host", LOCAL_HOSTS)
def test_where_nobody_needs_a_key_this_machine_is_served_by_its_own_name(host: bytes) -> None:
    assert caller(Tenants([]), scope(), None, host) is ANONYMOUS


@pytest.mark.parametrize("host", FOREIGN_HOSTS)
def test_other_machines_and_tenants_may_call_by_any_name(host: bytes) -> None:
    assert caller(Tenants([], allow_anyone=True), scope("10.0.0.1"), None, host) is ANONYMOUS
    assert caller(Tenants([A]), scope(), b"Bearer key-number-1", host).name == "a"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_loopback_address_to_listen_on_is_no_reason_to_warn(host: str) -> None:
    assert not open_to_others(Settings(host=host))


@pytest.mark.parametrize("host", [*FOREIGN_HOSTS, *LOCAL_HOSTS])
@pytest.mark.parametrize("address", ["10.0.0.1", "fe80::1", "::ffff:10.0.0.1", "", "nonsense"])
def test_where_nobody_needs_a_key_other_machines_are_refused(host: bytes, address: str) -> None:
    with pytest.raises(Forbidden, match="--allow-anyone"):
        caller(Tenants([]), scope(address), None, host)
    assert caller(Tenants([A]), scope(address), b"Bearer key-number-1", host).name == "a"


def test_letting_anyone_in_does_not_let_in_web_pages_of_this_machines_browser() -> None:
    with pytest.raises(Forbidden, match="localhost"):
        caller(Tenants([], allow_anyone=True), scope(), None, b"evil.example")


def test_whoever_listens_for_others_without_tenants_is_warned() -> None:
    assert "without a key" in open_to_others(Settings(host="0.0.0.0", allow_anyone=True))
    assert "are refused" in open_to_others(Settings(host="0.0.0.0"))
    assert not open_to_others(Settings(host="0.0.0.0", tenants=(A,)))


def test_what_is_no_address_is_not_loopback() -> None:
    assert not is_loopback("localhost")


@pytest.mark.parametrize(
    ("url", "leads_here"),
    [
        *(
            ("http://127.0.0.1:8000", True),
            ("http://localhost", True),
            ("http://[::1]:8000/x", True),
            ("https://LocalHost/", True),
        ),
        *(("http://user@localhost:1", True), ("http://localhost@evil.example", False), ("http://gateway:8000", False)),
        *(("http://10.0.0.1", False), ("localhost:8000", False), ("", False), ("http://[::1", False)),
    ],
)
def test_a_url_leads_to_this_machine_by_its_loopback_or_it_does_not(url: str, leads_here: bool) -> None:
    assert is_loopback_url(url) is leads_here
