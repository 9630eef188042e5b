"""`python -m tests.real.simulated`: the simulator against two real replicas.

Starts the fleet, measures its engines with single requests, plays conversations through the real gateway at their times whether
answers came or not, plays the same arrivals in the simulator with what was measured, and prints both. Exit status 0 if the
median and the 90th percentile of the time to first token agree within TOLERANCE.
"""

import argparse
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.simulate.peerkv import PeerKV
from bench.simulate.profiles import Profile
from bench.simulate.simulation import Fleet as SimulatedFleet
from bench.simulate.simulation import Simulation
from bench.simulate.summary import ttft_seconds
from bench.simulate.traces import Conversations, Trace, TraceRequest, made_up
from tests.real.calibration import BATCHED_TOKENS_MAX, Calibration, stream
from tests.real.fleet import REPLICAS, Fleet
from tests.real.prompts import Words

TOLERANCE = 0.2
BLOCK_TOKENS = 64
SETTLE_SECONDS = 1.0
SHAPE = Conversations(
    turns=3, system_blocks=2, blocks_each_turn=(2, 7), output_tokens=(6, 20), requests_second=1.0, pause_seconds=8.0
)


@dataclass(frozen=True)
class Result:
    """One way to play: times to first token in the order of arrival, and shares of the prompt tokens."""

    ttft: list[float]
    local_share: float
    peer_share: float

    def percentile(self, rank: float) -> float:
        return float(np.percentile(self.ttft, rank))


def prompt_ids(request: TraceRequest, words: Words, seed: int) -> list[int]:
    """Token ids for a request: equal blocks, equal ids."""
    ids: list[int] = []
    for block in request.blocks:
        ids.extend(words.choices(BLOCK_TOKENS, f"{seed}/{block}"))
    return ids[: request.prompt_tokens]


def play_real(fleet: Fleet, trace: Trace, seed: int) -> Result:
    """Send every request at its time, through the gateway's own steering."""
    words = Words(fleet.model_dir)
    bodies = [
        {"model": fleet.model, "prompt": prompt_ids(request, words, seed), "max_tokens": request.output_tokens}
        for request in trace.requests
    ]
    ttft = [0.0] * len(bodies)
    fleet.flush()
    time.sleep(SETTLE_SECONDS)

    def ask(number: int) -> None:
        ttft[number] = stream(fleet.client, bodies[number]).first

    with ExitStack() as stack:
        counted = [stack.enter_context(fleet.counting(replica)) for replica in REPLICAS]
        threads = []
        began = time.monotonic()
        for number, request in enumerate(trace.requests):
            time.sleep(max(0.0, began + request.arrival - time.monotonic()))
            threads.append(threading.Thread(target=ask, args=(number,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    assert all(ttft), "a request failed"
    prompt = sum(of.prompt for of in counted)
    return Result(ttft, sum(of.local for of in counted) / prompt, sum(of.peer for of in counted) / prompt)


def play_simulated(profile: Profile, trace: Trace, warm: Trace) -> Result:
    """Play the same arrivals; the cost model has learnt from `warm` before, as the real one did while it was measured."""
    learnt = PeerKV(SimulatedFleet(profile, len(REPLICAS), BLOCK_TOKENS), device="cpu")
    Simulation(warm, learnt.fleet, learnt).run()
    fleet = SimulatedFleet(profile, len(REPLICAS), BLOCK_TOKENS)
    played = Simulation(trace, fleet, PeerKV(fleet, device="cpu", costs=learnt.costs)).run()
    prompt = trace.prompt_tokens
    local, peer = (sum(getattr(job, name) for job in played.jobs) / prompt for name in ("local_tokens", "peer_tokens"))
    return Result(ttft_seconds(played), local, peer)


def rate_for(profile: Profile, trace: Trace, load: float) -> float:
    """Return how much faster the trace may come for the replicas to be computing that share of the time, at least."""
    engine = profile.engine
    seen: set[int] = set()
    seconds = 0.0
    for request in trace.requests:
        new = [block for block in request.blocks if block not in seen]
        seen.update(new)
        tokens = min(request.prompt_tokens, len(new) * BLOCK_TOKENS)
        pairs = tokens * (request.prompt_tokens - tokens / 2)
        seconds += engine.prefill_seconds_token * tokens + engine.attention_seconds_pair * pairs
        seconds += (request.output_tokens - 1) * engine.decode_step_seconds
    return load * len(REPLICAS) * trace.seconds / ((1 + engine.contention) * seconds)


def compare(real: Result, simulated: Result) -> tuple[list[str], bool]:
    """Return a table in Markdown, and whether the simulator is within the tolerance."""
    lines = ["| | real | simulated | simulated / real |", "|---|---|---|---|"]
    good = True
    for rank in (50, 90, 99):
        ours, theirs = real.percentile(rank), simulated.percentile(rank)
        lines.append(f"| time to first token, p{rank} | {ours:.3f} s | {theirs:.3f} s | {theirs / ours:.2f} |")
        good = good and (rank == 99 or abs(theirs / ours - 1) <= TOLERANCE)
    for what, name in (("local hits", "local_share"), ("imported", "peer_share")):
        lines.append(f"| prompt tokens: {what} | {getattr(real, name):.1%} | {getattr(simulated, name):.1%} | |")
    return lines, good


def measure(fleet: Fleet, options: argparse.Namespace, say: Callable[[str], None]) -> tuple[Profile, Result, Result]:
    """Calibrate, play for real, simulate."""
    profile = Calibration(fleet, say).profile()
    shape = made_up(_shape(options.requests), options.seed, block_tokens=BLOCK_TOKENS)
    trace = sped_up(shape, rate_for(profile, shape, options.load))
    say(f"{len(trace.requests)} requests in {trace.seconds:.0f} s, {trace.prompt_tokens} prompt tokens")
    real = play_real(fleet, trace, options.seed)
    warm = sped_up(made_up(_shape(100), options.seed + 1, block_tokens=BLOCK_TOKENS), rate_for(profile, shape, options.load))
    return profile, real, play_simulated(profile, trace, warm)


def _shape(requests: int) -> Conversations:
    values = asdict(SHAPE) | {"conversations": max(1, requests // SHAPE.turns)}
    return Conversations(**values)


def sped_up(trace: Trace, rate: float) -> Trace:
    """Return the trace with its arrivals `rate` times as fast."""
    requests = tuple(
        TraceRequest(it.arrival / rate, it.prompt_tokens, it.output_tokens, it.blocks, it.session) for it in trace.requests
    )
    return Trace(trace.name, trace.block_tokens, requests)


def main() -> int:
    """Entry point."""
    flags = argparse.ArgumentParser(prog="python -m tests.real.simulated", description=__doc__)
    flags.add_argument("--model", default="", help="a model's directory (the default model)")
    flags.add_argument("--requests", type=int, default=120)
    flags.add_argument("--load", type=float, default=0.5, help="share of the time that the replicas compute, at least (0.5)")
    flags.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the profile and all times there")
    options = flags.parse_args()
    fleet = Fleet(
        flags=(options.model,) if options.model else (), vllm_args=("--max-num-batched-tokens", str(BATCHED_TOKENS_MAX))
    )
    try:
        fleet.start()
        fleet.wait_ready()
        profile, real, simulated = measure(fleet, options, lambda text: print(text, file=sys.stderr, flush=True))
    except AssertionError as error:
        print(f"{error}\n{fleet.logs()}", file=sys.stderr)
        return 1
    finally:
        fleet.stop()
        fleet.remove()
    lines, good = compare(real, simulated)
    print("\n".join(lines))
    if options.json:
        content: dict[str, Any] = {"seed": options.seed, "profile": asdict(profile)}
        content |= {"real": asdict(real), "simulated": asdict(simulated)}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
