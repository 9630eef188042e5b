"""Where the time of an import goes: every part of an engine's way from a request's arrival to its first token, timed.

`python -m tests.gpu.bench steps`. The parts are methods of vLLM and of the connector, wrapped while the engine runs; a part's
time includes the parts that it calls.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from tests.gpu.engine_pair import Bench
from tests.gpu.replica import Replica, median, prompt

SIZES = (8192, 32768)
REPEATS = 5


class Trace:
    """Calls of wrapped methods: (part, began, ended), both in nanoseconds of `time.perf_counter_ns`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, int]] = []

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Time each call of a method of an object. Does nothing if this version of vLLM has no such method."""
        inner: Callable[..., Any] | None = getattr(owner, method, None)
        if inner is None:
            return

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return inner(*args, **kwargs)
            finally:
                self.calls.append((part, began, time.perf_counter_ns()))

        setattr(owner, method, timed)

    def take(self, since: int) -> list[tuple[str, float, float]]:
        """Return what was called, (part, milliseconds after `since`, milliseconds it took), and forget it."""
        calls, self.calls = self.calls, []
        return [(part, (began - since) / 1e6, (ended - began) / 1e6) for part, began, ended in calls]


def trace_engine(engine: Any) -> Trace:
    """Wrap the parts of an engine whose core lives in this process."""
    from vllm.distributed.kv_transfer.kv_transfer_state import get_kv_transfer_group

    trace, core = Trace(), engine.engine_core.engine_core
    scheduler, manager = core.scheduler, core.scheduler.kv_cache_manager
    trace.wrap(engine, "add_request", "take the request in")
    trace.wrap(core, "preprocess_add_request", "make the core's request (hashes)")
    trace.wrap(scheduler, "add_request", "queue it")
    trace.wrap(scheduler, "schedule", "schedule")
    trace.wrap(scheduler, "update_from_output", "update from output")
    trace.wrap(scheduler, "_update_waiting_for_remote_kv", "enter imported blocks in the prefix cache")
    trace.wrap(manager, "get_computed_blocks", "look the local cache up")
    trace.wrap(manager, "get_computed_blocks_for_connector", "look the local cache up")
    trace.wrap(manager, "allocate_slots", "allocate")
    trace.wrap(core.model_executor, "execute_model", "execute")
    trace.wrap(core.model_executor, "sample_tokens", "sample")
    connector = scheduler.connector
    for method, part in (
        ("on_new_request", "connector: arrival"),
        ("get_num_new_matched_tokens", "connector: match"),
        ("update_state_after_alloc", "connector: plan the import"),
        ("build_connector_meta", "connector: close the step"),
        ("update_connector_output", "connector: take the report"),
    ):
        trace.wrap(connector, method, part)
    trace.wrap(connector._scheduler, "_enter", "connector: enter checked blocks beside the copy")
    worker = get_kv_transfer_group()
    transport = worker._worker._transport
    trace.wrap(worker, "start_load_kv", "worker: begin imports")
    trace.wrap(transport, "start", "worker: start the copy")
    trace.wrap(transport, "_enqueue", "worker: enqueue the copy")
    trace.wrap(worker, "get_transfer_results", "worker: poll")
    trace.wrap(transport, "_finish", "worker: check the copy")
    return trace


def steps(bench: Bench, pair: list[Replica]) -> None:
    """Milliseconds of each part, summed over its calls until the first token: of a local hit, and of an import.

    Each behind a hit of another prompt, so that neither finds an engine that idled while the owner computed.
    """
    a, b = pair
    b.trace()
    for tokens in SIZES if bench.scale.devices[0] else bench.scale.sizes:
        found: dict[str, list[list[tuple[str, float, float]]]] = {"hit": [], "import": []}
        firsts: dict[str, list[float]] = {"hit": [], "import": []}
        other = prompt(tokens, 77 * tokens + REPEATS)
        for turn in range(REPEATS):
            ids = prompt(tokens, 77 * tokens + turn)
            a.ask(ids)
            for kind in ("import", "hit"):
                b.ask(other, source="")
                b.traced()
                answer = b.ask(ids)
                firsts[kind].append(answer.first_seconds * 1e3)
                found[kind].append(b.traced())
        parts = dict.fromkeys(part for calls in (*found["import"], *found["hit"]) for part, _, _ in calls)
        for kind, seen in firsts.items():
            bench.row("steps", tokens=tokens, kind=kind, part="first token", ms=median(seen))
        for part in parts:
            row: dict[str, Any] = {}
            for kind, runs in found.items():
                row[f"{kind}_ms"] = median([sum(took for name, _, took in calls if name == part) for calls in runs])
                row[f"{kind}_calls"] = median([sum(name == part for name, _, _ in calls) for calls in runs])
            bench.row("steps", tokens=tokens, part=part, **row)
        _print_timeline(tokens, found["import"][-1])
        _print_timeline(tokens, found["hit"][-1])


def _print_timeline(tokens: int, calls: list[tuple[str, float, float]]) -> None:
    """Print the last request call by call; empty steps between are shortened to their number."""
    skipped = 0
    for part, at, took in sorted(calls, key=lambda call: call[1]):
        if took < 0.15:
            skipped += 1
            continue
        print(
            f"    {tokens}: {at:8.2f} ms +{took:7.2f} {part}" + (f" ({skipped} short calls before)" if skipped else ""),
            flush=True,
        )
        skipped = 0
