"""The limits' part of /metrics, by tenant: of so many as gateway/limits/limiter.py shows apart."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from gateway.limits.shapes import LimitUse, QueueStats, SharedLimitStats, TenantUse
from gateway.stats.shapes import descriptions

_TOKENS: tuple[tuple[str, Callable[[TenantUse], float]], ...] = (
    ("uncached", lambda use: use.uncached_tokens),
    ("cached", lambda use: use.cached_tokens),
    ("generated", lambda use: use.generated_tokens),
)


def limit_metrics(uses: Sequence[TenantUse]) -> Iterator[Metric]:
    """Yield what tenants whose keys have limits used, and what they were refused."""
    requests = CounterMetricFamily(
        "peerkv_limit_requests", "Requests of keys with limits that were let in.", labels=("tenant",)
    )
    refused = CounterMetricFamily(
        "peerkv_limit_refused_requests", "Requests refused, by the limit that was reached.", labels=("tenant", "limit")
    )
    tokens = CounterMetricFamily("peerkv_limit_tokens", "Tokens used by keys with limits.", labels=("tenant", "kind"))
    charged = CounterMetricFamily(
        "peerkv_limit_charged_tokens", "The same tokens, weighed with their prices.", labels=("tenant",)
    )
    running = GaugeMetricFamily("peerkv_limit_in_flight_requests", "Requests of keys with limits now.", labels=("tenant",))
    allowed = GaugeMetricFamily(
        "peerkv_limit_allowed",
        "What one key may have of a limit: requests, or tokens weighed with their prices.",
        labels=("tenant", "limit"),
    )
    used = GaugeMetricFamily(
        "peerkv_limit_used",
        "What counts towards peerkv_limit_allowed now, reservations included. Of a tenant's keys both are those of the one"
        " that has used the largest share.",
        labels=("tenant", "limit"),
    )
    for use in uses:
        for limit, fullest in _fullest(use).items():
            allowed.add_metric((use.tenant, limit), fullest.limit)
            used.add_metric((use.tenant, limit), fullest.used)
        requests.add_metric((use.tenant,), use.requests)
        charged.add_metric((use.tenant,), use.charged_tokens)
        running.add_metric((use.tenant,), sum(key.requests_in_flight for key in use.keys))
        for limit, count in use.refused.items():
            refused.add_metric((use.tenant, limit), count)
        for kind, read in _TOKENS:
            tokens.add_metric((use.tenant, kind), read(use))
    yield from (requests, refused, tokens, charged, running, allowed, used)


def _fullest(use: TenantUse) -> dict[str, LimitUse]:
    """For each limit that keys of the tenant have, that of the key which has used the largest share of it."""
    found: dict[str, LimitUse] = {}
    for key in use.keys:
        for name, limit in key.limits.items():
            known = found.get(name)
            if known is None or limit.used * known.limit > known.used * limit.limit:
                found[name] = limit
    return found


def shared_limit_metrics(stats: SharedLimitStats) -> Iterator[Metric]:
    """Yield how it goes with the server that counts for several gateways."""
    for field, about in descriptions(SharedLimitStats).items():
        family = GaugeMetricFamily if field in ("up", "waiting_settlements") else CounterMetricFamily
        yield family(f"peerkv_shared_limits_{field}", f"Limits of several gateways: {about}.", value=getattr(stats, field))


def admission_metrics(queue: QueueStats) -> Iterator[Metric]:
    """Yield how requests waited for room at the replicas."""
    for field, about in descriptions(QueueStats).items():
        name, text = f"peerkv_admission_{field}", f"Where replicas get so many requests at once: {about}."
        family = GaugeMetricFamily if field == "waiting_requests" else CounterMetricFamily
        yield family(name, text, value=getattr(queue, field))
