"""The descriptors that this process may open: the limit is raised, and the bounds of the front door fitted to it."""

from __future__ import annotations

import os
import resource

from gateway.settings import Settings

RESERVED = 128
"""For logs, tables, health checks, libraries, and connections that are taken to be refused."""


def raise_limit() -> int:
    """Allow as many descriptors as the hard limit lets; returns how many. What is started from here inherits that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return _count(hard)


def limits() -> tuple[int, int]:
    """The soft and the hard limit of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _count(soft), _count(hard)


def fitted(settings: Settings, descriptors: int, opened: int | None = None) -> Settings:
    """The settings with bounds that `descriptors` suffice for; `opened` are those in use.

    A client's connection takes one, and a request in flight another one to its replica. Connections beyond those in flight
    are kept too, for the clients that get a 429, and for those that are silent.
    """
    room = max(4, descriptors - RESERVED - (len(os.listdir("/proc/self/fd")) if opened is None else opened))
    in_flight = min(settings.requests_in_flight_max, max(1, room * 2 // 5))
    connections = min(settings.connections_max, room - in_flight)
    return settings.model_copy(update={"requests_in_flight_max": in_flight, "connections_max": connections})


def in_words(asked: Settings, got: Settings, descriptors: int) -> str:
    """What was lowered, and what to do; "" if nothing was."""
    lowered = [
        f"{name} from {getattr(asked, name)} to {getattr(got, name)}"
        for name in ("requests_in_flight_max", "connections_max")
        if getattr(asked, name) != getattr(got, name)
    ]
    if not lowered:
        return ""
    return f"{descriptors} descriptors are too few, so {' and '.join(lowered)}: raise the hard limit (ulimit -Hn, LimitNOFILE)"


def _count(limit: int) -> int:
    return 1 << 30 if limit == resource.RLIM_INFINITY else limit
