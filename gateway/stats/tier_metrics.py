"""Disk and vault as metrics, each with a label `tier`, and what was asked of them."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.frame_tiers.store import StoreStats
from gateway.planner.promotions import PromotionCounts
from gateway.stats.shapes import TiersBelow, descriptions

_GAUGES = ("frames", "bytes", "bytes_max")
_WORDS = ("name", "state")


def tier_metrics(tiers: TiersBelow) -> Iterator[Metric]:
    """The figures of every store, those of the ways down and up, and what this gateway asked for."""
    well = GaugeMetricFamily("peerkv_tier_ok", "1 while the tier takes and gives blocks.", labels=("tier",))
    for store in tiers.stores:
        well.add_metric((store.name,), float(store.state == "ok"))
    yield well
    for field, text in descriptions(StoreStats).items():
        if field in _WORDS:
            continue
        kind = GaugeMetricFamily if field in _GAUGES else CounterMetricFamily
        metric = kind(f"peerkv_tier_{field}", f"Of disk and vault: {text}.", labels=("tier",))
        for store in tiers.stores:
            metric.add_metric((store.name,), getattr(store, field))
        yield metric
    for field, text in descriptions(TiersBelow).items():
        if field not in ("stores", "asked"):
            yield CounterMetricFamily(f"peerkv_tiers_{field}", f"Below host memory: {text}.", value=getattr(tiers, field))
    for field, text in descriptions(PromotionCounts).items():
        yield CounterMetricFamily(f"peerkv_promotions_{field}", f"For requests: {text}.", value=getattr(tiers.asked, field))
