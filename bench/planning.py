"""What planning and accounting cost a request, step by step, in process: `python -m bench.planning --model DIR`.

The planner, the tokenizer, the ledger and two replicas' block tables are real; the engine's part is a record in its table
that says what was delivered. Each prompt is one of eight known documents and a question never asked before; 32 are in flight.
Figures are microseconds of this thread's processor time: the 20th percentile of means over MEAN_OF requests, since other
programs use the same caches and cores.
`--profile` prints where the time goes, by cProfile.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from bench.cases import Case, Endpoint, bodies, documents
from bench.decision import BLOCK_SIZE, FIELDS, ROOT, StandingFleet
from bench.field.flags import default_model
from bench.report import quantile
from gateway.api.body import decode_body
from gateway.block_registry.fleet_watch import HOLD_SECONDS
from gateway.ledger.attempts import Attempt, RequestInfo
from gateway.ledger.ledger import Ledger
from gateway.ledger.recorder import Recorder
from gateway.planner.plan import Plan
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.settings import load
from gateway.tenants.tenants import ANONYMOUS
from gateway.token_ids import TokenIds
from transport.keys import chain_keys
from transport.table.deliveries import Delivery
from transport.table.directory import TableDirectory
from transport.table.layout import Description
from transport.table.writer import TableWriter

NAMES = ("replica-0", "replica-1")
BLOCKS = 1 << 16
IN_FLIGHT = 32
MEAN_OF = 16
CASES: tuple[tuple[str, int, Endpoint], ...] = (
    ("small", 200, "completions"),
    ("small chat", 200, "chat"),
    ("16 KB", 16 << 10, "completions"),
    ("16 KB chat", 16 << 10, "chat"),
    ("220 KB", 220 << 10, "completions"),
)
STEPS = ("plan", "sent", "first byte", "ended")
WARM_TIMES = 4
"""So often each document is asked about beforehand, until its beginning is known."""
T = TypeVar("T")


class Steps:
    """A planner and a recorder over tables that hold the documents; `seconds` collects the times of each of STEPS."""

    def __init__(self, stack: ExitStack, service: TokenService, characters: int, endpoint: Endpoint) -> None:
        self.seconds: dict[str, list[float]] = {step: [] for step in STEPS}
        self._endpoint: Endpoint = endpoint
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm", prefix="peerkv-planning-")))
        self._writers: dict[str, TableWriter] = {}
        for name in NAMES:
            about = Description(name, os.getpid(), "xxh3_128", "shared_memory", "ok", FIELDS, ())
            self._writers[name] = stack.enter_context(closing(TableWriter(directory, about, BLOCK_SIZE, BLOCKS)))
        tables = stack.enter_context(closing(TableDirectory(directory, hold_seconds=HOLD_SECONDS)))
        settings = load()
        self._planner = Planner(StandingFleet(directory, list(NAMES)), tables, service, settings)
        self._planner.prompts.parity = ParityVerdict(KindVerdict(Parity.EXACT), KindVerdict(Parity.EXACT))
        self._recorder = Recorder(Ledger(settings.ledger_requests_max), self._planner)
        self._flying: deque[tuple[Plan, Attempt]] = deque()
        self._number = 0
        used = dict.fromkeys(NAMES, 0)
        for number, text in enumerate(documents(characters)):
            name = NAMES[number % len(NAMES)]
            for question in range(WARM_TIMES):
                _encoded(service, endpoint, f"{text} Question: is it {question}?")
            ids = _encoded(service, endpoint, text)
            keys = chain_keys(ROOT, ids, BLOCK_SIZE)
            self._writers[name].publish(range(used[name], used[name] + len(keys)), keys)
            used[name] += len(keys)

    def request(self, body: dict[str, Any]) -> None:
        """Plan one more request; the one from IN_FLIGHT requests ago is answered first."""
        if len(self._flying) == IN_FLIGHT:
            self._answer()
        self._number += 1
        plan = self._timed("plan", lambda: self._planned(body))
        info = RequestInfo(f"id-{self._number}", self._endpoint, "", "model")
        self._flying.append((plan, self._timed("sent", lambda: self._recorder.begin(plan, info))))

    def _planned(self, body: dict[str, Any]) -> Plan:
        work = self._planner.plan(self._endpoint, body, ANONYMOUS)
        try:
            while work.send(None) is None:
                pass  # it waited for others
        except StopIteration as stop:
            plan: Plan = stop.value
        else:
            raise RuntimeError("the prompt was tokenised in a thread: it does not resemble an earlier one")
        if isinstance(plan.prompt, TokenIds):
            plan.prompt.text  # noqa: B018  the ids as JSON, as the relay sends them
        return plan

    def _answer(self) -> None:
        plan, attempt = self._flying.popleft()
        self._deliver(plan)
        self._timed("first byte", lambda: self._recorder.first_byte(attempt))
        self._timed("ended", lambda: self._recorder.ended(attempt, 200))

    def _deliver(self, plan: Plan) -> None:
        now, expected = time.monotonic_ns(), plan.decision.expected
        delivery = Delivery(
            tag=plan.tag,
            arrived_ns=now - 30_000_000,
            asked_ns=now - 30_000_000,
            scheduled_ns=now - 29_000_000,
            first_token_ns=now,
            prompt_tokens=plan.prompt_tokens,
            local_tokens=expected.local_tokens,
            peer_tokens=expected.peer_tokens,
            computed_tokens=expected.computed_tokens,
        )
        self._writers[plan.replica.name].deliver(delivery, "shared_memory")

    def _timed(self, step: str, work: Callable[[], T]) -> T:
        began = time.thread_time()
        result = work()
        self.seconds[step].append(time.thread_time() - began)
        return result


def _encoded(service: TokenService, endpoint: Endpoint, text: str) -> TokenIds:
    if endpoint == "completions":
        return service.encode(text)
    return service.encode_chat({"messages": [{"role": "user", "content": text}]})


def run(steps: Steps, source: Iterator[bytes], requests: int) -> None:
    """Plan and answer `requests` requests; the bodies are generated in advance."""
    for body in [decode_body(next(source)) for _ in range(requests)]:
        steps.request(body)


def _means(seconds: list[float]) -> list[float]:
    """Of MEAN_OF requests each."""
    return [fmean(seconds[start : start + MEAN_OF]) for start in range(0, len(seconds), MEAN_OF)]


def main() -> int:
    """Measure and print a table; status 1 if the model has no tokenizer."""
    parser = argparse.ArgumentParser(prog="bench.planning", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="", help="directory with the tokenizer (default: peerkv's default model)")
    parser.add_argument(
        "--rounds", type=int, default=12, help="rounds of 300 small requests, 100 of 16 KB and 40 of 220 KB (default: 12)"
    )
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by function")
    given = parser.parse_args()
    service = TokenService(TokenizerSource(given.model or default_model()))
    if not (state := service.load()).loaded:
        print(f"bench.planning: {state.reason}", file=sys.stderr)
        return 1
    print(f"| prompt | {' | '.join(STEPS)} | in all |\n|{'---|' * (len(STEPS) + 2)}")
    for name, characters, endpoint in CASES:
        requests = 300 if characters < 10_000 else 100 if characters < 100_000 else 40
        with ExitStack() as stack:
            steps = Steps(stack, service, characters, endpoint)
            source = bodies(Case(name, characters, IN_FLIGHT), "tail", endpoint, 1 << 20)
            run(steps, source, requests)  # warm-up requests do not count
            steps.seconds = {step: [] for step in STEPS}
            profile = cProfile.Profile() if given.profile else None
            with profile or nullcontext():
                for _ in range(given.rounds):
                    run(steps, source, requests)
            found = [quantile(_means(steps.seconds[step]), 0.2) * 1e6 for step in STEPS]
            print(f"| {name} | {' | '.join(f'{each:.0f}' for each in found)} | {sum(found):.0f} |", flush=True)
            if profile is not None:
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
