"""The figures of a real fleet's engines, from single requests to them: a profile for the simulator.

Every time is from sending a request to the gateway to the first data of its event stream, so the profile's fixed parts include
the gateway and the client.
"""

import contextlib
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from bench.simulate.profiles import EngineProfile, LinkProfile, Profile
from tests.real.fleet import REPLICAS, Fleet
from tests.real.prompts import Words

SIZES = (64, 256, 640, 1100, 1700)
REPEATS = 3
DECODED_TOKENS = 40
DECODING_TOGETHER = 4
CONTENDED_TOKENS = 1100
BATCHED_TOKENS_MAX = 2048
BLOCK_TOKENS = 32
IMPORT_TOKENS_MIN = 200  # smaller copies are lost in the noise
KV_TOKEN_BYTES = 46080
"""Of the default model, in float32; only the ratio to the fitted bandwidth matters."""


@dataclass(frozen=True)
class Streamed:
    """Seconds from sending to the first data and to the end, and the cached tokens that the answer reports."""

    first: float
    whole: float
    cached: int


def stream(client: httpx.Client, body: dict[str, Any], replica: str = "") -> Streamed:
    """Send a completion and read its stream to the end."""
    headers = {"x-peerkv-replica": replica} if replica else {}
    asked = body | {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True}
    began, first, cached = time.perf_counter(), 0.0, 0
    with client.stream("POST", "/v1/completions", json=asked, headers=headers) as answer:
        for line in answer.iter_lines():
            first = first or time.perf_counter() - began
            assert answer.status_code == 200, line
            if '"usage":{' in line:
                usage = json.loads(line.removeprefix("data: "))["usage"]
                cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    return Streamed(first, time.perf_counter() - began, cached)


@dataclass(frozen=True)
class Measured:
    """Median seconds to the first token by prompt size, and of decode steps; by what share a busy neighbour slows a replica."""

    cold: dict[int, float]
    hit: dict[int, float]
    imported: dict[int, float]
    decode_alone: float
    decode_together: float
    contention: float
    kv_blocks: int


class Calibration:
    """Asks a quiet fleet."""

    def __init__(self, fleet: Fleet, say: Callable[[str], None]) -> None:
        self._fleet = fleet
        self._words = Words(fleet.model_dir)
        self._say = say
        self._body = {"model": fleet.model}

    def profile(self) -> Profile:
        """Measure, and return the profile."""
        for replica in REPLICAS:
            self._ask(self._words.ids(300), replica)
        cold, hit, imported = {}, {}, {}
        for size in SIZES:
            cold[size], hit[size], imported[size] = (statistics.median(times) for times in zip(*self._sizes(size), strict=True))
            self._say(f"{size} tokens: cold {cold[size]:.3f} s, hit {hit[size]:.3f} s, import {imported[size]:.3f} s")
        alone, together = self._decode_steps()
        contention = self._contention(cold[CONTENDED_TOKENS])
        with contextlib.closing(self._fleet.table(REPLICAS[0])) as table:
            return fitted(Measured(cold, hit, imported, alone, together, contention, table.num_blocks))

    def _sizes(self, size: int) -> list[tuple[float, float, float]]:
        """Seconds cold, by a local hit, and by an import, each time with a prompt of its own."""
        times = []
        for turn in range(REPEATS):
            one, other = REPLICAS[turn % 2], REPLICAS[1 - turn % 2]
            prompt = self._words.ids(size)
            cold = self._ask(prompt, one)
            hit = self._ask(prompt, one)
            imported = self._ask(prompt, other)
            times.append((cold.first, hit.first, imported.first))
        return times

    def _decode_steps(self) -> tuple[float, float]:
        """Seconds of a step for one sequence, and for DECODING_TOGETHER."""
        alone, together = (
            statistics.median(self._decode(sequences) for _ in range(REPEATS)) for sequences in (1, DECODING_TOGETHER)
        )
        self._say(f"a decode step: {alone * 1e3:.1f} ms, of {DECODING_TOGETHER} sequences {together * 1e3:.1f} ms")
        return alone, together

    def _decode(self, sequences: int) -> float:
        prompts = [self._words.ids(40) for _ in range(sequences)]
        answers = self._together([(prompt, REPLICAS[0], DECODED_TOKENS) for prompt in prompts])
        return statistics.median((answer.whole - answer.first) / (DECODED_TOKENS - 1) for answer in answers)

    def _contention(self, alone: float) -> float:
        """By what share a prompt takes longer while the other replica computes one."""
        taken = []
        for _ in range(REPEATS):
            asked = [(self._words.ids(CONTENDED_TOKENS), replica, 1) for replica in REPLICAS]
            taken.extend(answer.first for answer in self._together(asked))
        share = max(0.0, statistics.median(taken) / alone - 1)
        self._say(f"beside a busy replica a prompt takes {share:.0%} longer")
        return share

    def _ask(self, prompt: Sequence[int], replica: str, tokens: int = 1) -> Streamed:
        return stream(self._fleet.client, self._body | {"prompt": list(prompt), "max_tokens": tokens}, replica)

    def _together(self, asked: Sequence[tuple[Sequence[int], str, int]]) -> list[Streamed]:
        answers: list[Streamed] = []
        threads = [threading.Thread(target=lambda one=one: answers.append(self._ask(*one))) for one in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == len(asked), "a request failed"
        return answers


def fitted(measured: Measured) -> Profile:
    """Return the profile whose engine would take those times."""
    fixed, token, square = _least_squares(lambda n: (1.0, n, n * n), measured.cold)
    hit_fixed, hit_token = _least_squares(lambda n: (1.0, n), measured.hit)
    sizes = [size for size in measured.imported if size >= IMPORT_TOKENS_MIN]
    copies = {size: max(1e-4, measured.imported[size] - measured.hit[size]) for size in sizes}
    import_fixed, import_token = _least_squares(lambda n: (1.0, n), copies)
    sequence = max(0.0, (measured.decode_together - measured.decode_alone) / (DECODING_TOGETHER - 1))
    step = max(1e-4, measured.decode_alone - sequence)
    least = min(hit_fixed, step)
    handling = hit_fixed - least
    engine = EngineProfile(
        block_tokens=BLOCK_TOKENS,
        kv_blocks=measured.kv_blocks,
        kv_bytes_token=KV_TOKEN_BYTES,
        batched_tokens_max=BATCHED_TOKENS_MAX,
        sequences_max=16,
        prefill_step_seconds_min=least,
        prefill_step_seconds=max(0.0, fixed - handling),
        prefill_seconds_token=max(1e-6, token - hit_token),
        attention_seconds_pair=2 * square,
        decode_step_seconds=step,
        decode_seconds_sequence=sequence,
        decode_seconds_context_token=0.0,
        request_seconds=handling,
        request_seconds_token=hit_token,
        response_seconds=0.0,
        contention=measured.contention,
    )
    links = LinkProfile(within_host_seconds=import_fixed, within_host_bytes_second=KV_TOKEN_BYTES / max(import_token, 1e-9))
    return Profile("calibrated", engine, links)


def _least_squares(terms: Callable[[int], tuple[float, ...]], seconds: dict[int, float]) -> tuple[float, ...]:
    """Fit with relative errors; terms that come out negative are left out, the last first."""
    sizes = sorted(seconds)
    values = np.array([seconds[size] for size in sizes])
    rows = np.array([terms(size) for size in sizes]) / values[:, None]
    kept = list(range(rows.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(rows[:, kept], np.ones(len(sizes)), rcond=None)
        negative = [place for place, value in zip(kept, found, strict=True) if value < 0]
        if not negative:
            fitted = dict(zip(kept, found.tolist(), strict=True))
            return tuple(fitted.get(place, 0.0) for place in range(rows.shape[1]))
        kept.remove(negative[-1])
