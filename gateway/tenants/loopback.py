"""Loopback addresses, and the names of this machine that nobody else can make point here."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from urllib.parse import urlsplit

ADDRESSES_MAX = 1024
_HOST = re.compile(r"(?:\[(?P<v6>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/\s]+))(?::[0-9]*)?")


@lru_cache(maxsize=ADDRESSES_MAX)
def is_loopback(address: str) -> bool:
    """Whether an IP address is a loopback one, also as IPv4 inside IPv6."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return bool((mapped or ip).is_loopback)


@lru_cache(maxsize=ADDRESSES_MAX)
def is_loopback_host(host: bytes) -> bool:
    """Whether `host`, with or without a port, as in a URL or a Host header, is localhost or a loopback address.

    A web page can be given a name that resolves to this machine, and any other address of it, but neither of these.
    """
    found = _HOST.fullmatch(host.decode("latin-1").strip().lower())
    if found is None:
        return False
    name = found["v6"] or found["name"]
    return name == "localhost" or is_loopback(name)


def is_loopback_url(url: str) -> bool:
    """Whether a URL leads to this machine by its loopback, so that no proxy can have a part in it."""
    try:
        host = urlsplit(url).netloc.rpartition("@")[2]
    except ValueError:
        return False
    return is_loopback_host(host.encode("utf-8"))


def port_here(url: str) -> int | None:
    """The port of a URL that leads to this machine by its loopback; None for any other URL."""
    if not is_loopback_url(url):
        return None
    parts = urlsplit(url)
    try:
        return parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:  # it is no port
        return None


def names_loopback(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request's headers, names in lower case, name such a host, once."""
    hosts = [value for name, value in headers if name == b"host"]
    return len(hosts) == 1 and is_loopback_host(hosts[0])
