"""What a request costs in time, fitted from what was delivered: prefill per model, transfer per pair of replicas, the queue.

    first token = fixed + handling·prompt + [c·new + q·pairs] of the work ahead and its own + decode·running·steps + transfer

`new` are prompt tokens that nobody supplies, `pairs` the pairs of a new token and one before it, which is what attention
computes: new·(cached + new/2). Pure: times come in as arguments, all in seconds.
"""

from collections import deque
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Annotated

import msgspec
from pydantic import Field

from gateway.steering.costs.fitting import Fit
from gateway.steering.costs.priors import PREFILL_FACTORS_MAX, ModelKey, PrefillTerms, device_kind
from gateway.steering.costs.replica_load import ReplicaLoad
from gateway.steering.costs.sampling import Sampling
from gateway.steering.costs.times import CHUNK_TOKENS, ModelTimes, pairs
from gateway.steering.costs.transfers import Transfers

__all__ = ["CostModel", "CostStats", "ModelKey", "Outcome", "PrefillTerms", "pairs"]

MEMORY = 400
"""Samples after which one has faded to 1/e."""
ERRORS_KEPT = 100
SECONDS_MIN = 1e-9
UNCERTAINTY_MIN = 0.02
UNCERTAINTY_MAX = 0.2


class Outcome(msgspec.Struct, frozen=True, gc=False):
    """One answered request, as it was expected and as it came.

    `load` is what was ahead of it when it was sent, `computed_tokens` and `peer_tokens` were delivered; `import_seconds` is the
    engine's word for the wait for the import, None if it is not known. `first_byte_seconds` counts from the sending.
    `import_failed`: not all of it came, so that its time and bytes are not those of `peer_tokens`; `import_mixed`: it came from
    more than `source`, so that they tell of no pair.
    """

    key: ModelKey
    replica: str
    source: str | None
    transport: str
    load: ReplicaLoad
    now: float
    prompt_tokens: int
    computed_tokens: int
    peer_tokens: int
    expected_seconds: float
    first_byte_seconds: float
    import_seconds: float | None = None
    import_bytes: int = 0
    import_failed: bool = False
    import_mixed: bool = False

    @property
    def tells_of_pair(self) -> bool:
        """Whether the import's time and bytes are those of `peer_tokens` from `source`."""
        return not (self.import_failed or self.import_mixed)


@dataclass(frozen=True, slots=True)
class PrefillStats:
    """Fitted times of computing prompts, for one model on one kind of device, in seconds."""

    device: str
    model: Annotated[str, Field(description="beginning of its fingerprint")]
    samples: int
    usual_error: Annotated[float, Field(description="relative")]
    slowdown: Annotated[float, Field(description="factor on all expected times after the last answer; fades to 1 in seconds")]
    fixed_seconds: float
    seconds_per_prompt_token: float
    seconds_per_new_token: float
    seconds_per_pair: Annotated[float, Field(description="a pair is a new token and one before it")]
    seconds_per_decode_step: Annotated[float, Field(description="for each request that is being decoded beside it")]


@dataclass(frozen=True, slots=True)
class TransferStats:
    """Fitted times of imports: for a pair of replicas, or for a whole transport if both names are empty."""

    taker: str
    source: str
    transport: str
    samples: int
    usual_error: Annotated[float, Field(description="relative")]
    fixed_seconds: float
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class CostStats:
    """What steering expects requests to cost, and how accurate that was."""

    samples: Annotated[int, Field(description="answered requests that the model learnt from")] = 0
    samples_kept: Annotated[int, Field(description="of these, the most recent ones that `median_error` covers")] = 0
    median_error: Annotated[
        float | None, Field(description="relative error of the expected time to the first token; null without samples")
    ] = None
    prefill: tuple[PrefillStats, ...] = ()
    transfers: tuple[TransferStats, ...] = ()


class CostModel:
    """Expects times and learns from outcomes. Belongs to one thread."""

    def __init__(self) -> None:
        self._prefill: dict[ModelKey, Fit] = {}
        self._models: dict[ModelKey, ModelTimes] = {}
        self._transfers = Transfers(MEMORY)
        self._kv_token_bytes: dict[str, float] = {}
        self._sizes: dict[str, tuple[float, float]] = {}
        self._errors: deque[float] = deque(maxlen=ERRORS_KEPT)
        self._sampling: dict[ModelKey, Sampling] = {}
        self._samples = 0
        self._uncertainty = UNCERTAINTY_MAX

    def pass_time(self, now: float) -> None:
        """It is `now`: what was learnt of imports fades, so that one that seemed slow is tried again some time."""
        self._transfers.pass_time(now)

    # What it expects

    def model(self, key: ModelKey) -> ModelTimes:
        """What computing takes with a model: one and the same object, which learns."""
        model = self._models.get(key)
        if model is None:
            model = self._models[key] = ModelTimes(device_kind(key.device))
        return model

    def transfer_seconds(
        self, taker: str, source: str, transport: str, tokens: int, *, sharing: int = 1, device: str = ""
    ) -> float:
        """Importing `tokens`; `sharing` transfers use the same replicas at a time. `device` tells how large a token is."""
        if tokens <= 0:
            return 0.0
        kv_bytes = self._import_bytes(device, tokens) * max(1, sharing)
        fixed, a_byte = self._transfers.terms(taker, source, transport)
        return fixed + a_byte * kv_bytes

    def size_imports(self, device: str, fixed_bytes: float, token_bytes: float) -> None:
        """A model's imports have `fixed_bytes` for windows and states, and `token_bytes` for each token; zeros are unknown."""
        if fixed_bytes or token_bytes:
            self._sizes[device] = (fixed_bytes, token_bytes)

    def _import_bytes(self, device: str, tokens: int) -> float:
        fixed, each = self._sizes.get(device) or (0.0, self.kv_token_bytes(device))
        return fixed + each * tokens

    def transfer_terms(self, taker: str, source: str, transport: str, device: str) -> tuple[float, float]:
        """Seconds for each import, and seconds for each token of it, while no other import uses these replicas."""
        fixed, a_byte = self._transfers.terms(taker, source, transport)
        fixed_bytes, token_bytes = self._sizes.get(device) or (0.0, self.kv_token_bytes(device))
        return fixed + a_byte * fixed_bytes, a_byte * token_bytes

    def transport_measured(self, transport: str, bytes_per_second: float) -> None:
        """A transport moves so many bytes a second, as measured by others than requests. Raises KeyError for an unknown one."""
        self._transfers.measured(transport, bytes_per_second)

    def promotion_seconds(self, store: str, device: str, tokens: int) -> float:
        """Bringing up `tokens` from a disk or a vault."""
        return self.transfer_seconds("", store, store, tokens, device=device)

    def kv_token_bytes(self, device: str) -> float:
        """Bytes of KV that one token has; from the imports so far."""
        known = self._kv_token_bytes.get(device)
        return device_kind(device).kv_token_bytes if known is None else known

    def uncertainty(self) -> float:
        """The relative error to reckon with: options that differ by less are equal."""
        return self._uncertainty

    # What it learns

    def wants(self, key: ModelKey, source: str | None, now: float) -> bool:
        """Tell whether to `observe` a request whose first token came `now`.

        Imports always; of other requests of a model only some, if they come faster than it pays to learn from all.
        """
        if source is not None:
            return True
        sampling = self._sampling.get(key)
        if sampling is None:
            sampling = self._sampling[key] = Sampling()
        return sampling.takes(now)

    def observe(self, outcome: Outcome) -> None:
        """Learn from an answered request; its import, when it had one, tells of the pair and the rest of the model."""
        self._samples += 1
        seconds = max(outcome.first_byte_seconds, SECONDS_MIN)
        self._errors.append(abs(outcome.expected_seconds - seconds) / seconds)
        if self._samples % 8 == 0 or self._samples < 16:
            self._uncertainty = min(max(median(self._errors), UNCERTAINTY_MIN), UNCERTAINTY_MAX)
        slowdown = self.model(outcome.key).slowdown
        slowed = sqrt(slowdown.factor(outcome.now))  # so the terms follow what stays, and what goes again moves them by half
        features = self._features(outcome)
        if outcome.tells_of_pair:
            slowdown.heard(seconds / self._expected(outcome, features), outcome.now + seconds)
        self._learn(outcome, features, slowed)

    def _expected(self, outcome: Outcome, features: tuple[float, ...]) -> float:
        """What the terms say of what was delivered, above 0, whatever the slowdown."""
        transfer = 0.0
        if outcome.source is not None:
            transfer = self.transfer_seconds(
                outcome.replica,
                outcome.source,
                outcome.transport,
                outcome.peer_tokens,
                sharing=outcome.load.importing + 1,
                device=outcome.key.device,
            )
        return max(transfer + self._fit(outcome.key).predict(features), SECONDS_MIN)

    def _learn(self, outcome: Outcome, features: tuple[float, ...], slowed: float) -> None:
        """Learn the terms from times that are `slowed` times what they usually are."""
        seconds = outcome.first_byte_seconds / slowed
        imported = outcome.source is not None and outcome.peer_tokens > 0
        if outcome.import_seconds is not None:
            if imported and outcome.tells_of_pair:
                self._observe_transfer(outcome, outcome.import_seconds / slowed)
            seconds -= outcome.import_seconds / slowed
        elif imported:  # only the sum is known: the model is believed, and the pair gets the rest
            rest = seconds - self._fit(outcome.key).predict(features)
            self._observe_transfer(outcome, max(rest, seconds * 0.05))
            return
        if seconds > 0:
            fit = self._fit(outcome.key)
            fit.observe(features, seconds)
            self.model(outcome.key).learn(PrefillTerms(*fit.coefficients))

    def _features(self, outcome: Outcome) -> tuple[float, ...]:
        model, load = self.model(outcome.key), outcome.load
        ahead, ahead_pairs = load.ahead(outcome.now, model.new_token, model.pair)
        new = outcome.computed_tokens
        paid, paid_pairs = model.paid(outcome.prompt_tokens, new)
        return (
            1.0,
            float(outcome.prompt_tokens),
            ahead + paid,
            ahead_pairs + paid_pairs,
            load.decoding * (1 + (ahead + new) / CHUNK_TOKENS),
        )

    def _observe_transfer(self, outcome: Outcome, seconds: float) -> None:
        device = outcome.key.device
        if outcome.import_bytes > 0:
            self._kv_token_bytes[device] = outcome.import_bytes / outcome.peer_tokens
        kv_bytes = self._import_bytes(device, outcome.peer_tokens) * max(1, outcome.load.importing + 1)
        assert outcome.source is not None
        self._transfers.observe((outcome.replica, outcome.source, outcome.transport), kv_bytes, seconds, outcome.now)

    def observe_promotion(self, store: str, device: str, tokens: int, seconds: float, now: float) -> None:
        """Learn that `tokens` came up from a disk or a vault in `seconds`."""
        self._transfers.observe(("", store, store), self._import_bytes(device, tokens), seconds, now)

    def _fit(self, key: ModelKey) -> Fit:
        fit = self._prefill.get(key)
        if fit is None:
            fit = self._prefill[key] = Fit(device_kind(key.device).prefill, MEMORY, PREFILL_FACTORS_MAX)
        return fit

    # What it shows

    def median_error(self) -> float | None:
        """Of the last predictions, relative to what was measured; None before the first."""
        return median(self._errors) if self._errors else None

    def report(self) -> CostStats:
        """Everything fitted, for people."""
        prefill = tuple(
            PrefillStats(
                key.device, key.model, fit.samples, fit.usual_error, self._models[key].slowdown.last, *fit.coefficients
            )
            for key, fit in sorted(self._prefill.items())
        )
        transfers = tuple(
            TransferStats(*pair, fit.samples, fit.usual_error, fixed, 1 / a_byte if a_byte else 0.0)
            for pair, fit, (fixed, a_byte) in self._transfers.known()
        )
        return CostStats(self._samples, len(self._errors), self.median_error(), prefill, transfers)
