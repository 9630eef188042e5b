"""The cost model's figures in GET /kv/stats and /metrics."""

from collections.abc import Iterator
from dataclasses import asdict

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, Field

from gateway.costs import CostReport


class PrefillStats(BaseModel):
    """Fitted times of computing prompts, for one model on one kind of device, in seconds."""

    device: str
    model: str = Field(description="beginning of its fingerprint")
    samples: int
    usual_error: float = Field(description="relative")
    pace: float = Field(description="what everything expected was multiplied with after the last answer; fades to 1 in seconds")
    fixed_seconds: float
    seconds_per_prompt_token: float
    seconds_per_new_token: float
    seconds_per_pair: float = Field(description="a pair is a new token and one before it")
    seconds_per_decode_step: float = Field(description="for each request that is being decoded beside it")


class TransferStats(BaseModel):
    """Fitted times of imports: of a pair of replicas, or of all of a transport when both names are empty."""

    taker: str
    source: str
    transport: str
    samples: int
    usual_error: float = Field(description="relative")
    fixed_seconds: float
    bytes_per_second: float


class CostStats(BaseModel):
    """What steering expects requests to cost, and how well that held."""

    samples: int = Field(0, description="answered requests that it learnt from")
    samples_kept: int = Field(0, description="of these, the last ones that `median_error` is of")
    median_error: float | None = Field(None, description="of the expected time to the first token, relative; null without any")
    prefill: list[PrefillStats] = Field(default_factory=list)
    transfers: list[TransferStats] = Field(default_factory=list)


def cost_stats(report: CostReport) -> CostStats:
    """The report as it is shown."""
    return CostStats.model_validate(asdict(report))


def cost_metrics(costs: CostStats) -> Iterator[Metric]:
    """The fitted terms, labelled by what they are of."""
    yield CounterMetricFamily("peerkv_cost_samples", "Answered requests that the cost model learnt from.", value=costs.samples)
    if costs.median_error is not None:
        text = "Relative error of the expected time to the first token, median of the last requests."
        yield GaugeMetricFamily("peerkv_cost_median_error", text, value=costs.median_error)
    prefill = GaugeMetricFamily(
        "peerkv_cost_prefill_seconds", "Fitted terms of computing a prompt.", labels=("device", "model", "term")
    )
    for one in costs.prefill:
        for term, value in one.model_dump().items():
            if "seconds" in term:
                prefill.add_metric((one.device, one.model, term), value)
    yield prefill
    pair = ("taker", "source", "transport")
    fixed = GaugeMetricFamily("peerkv_cost_transfer_fixed_seconds", "Fitted time of an import beside its bytes.", labels=pair)
    rate = GaugeMetricFamily("peerkv_cost_transfer_bytes_per_second", "Fitted rate of imports.", labels=pair)
    for each in costs.transfers:
        labels = (each.taker, each.source, each.transport)
        fixed.add_metric(labels, each.fixed_seconds)
        rate.add_metric(labels, each.bytes_per_second)
    yield fixed
    yield rate
