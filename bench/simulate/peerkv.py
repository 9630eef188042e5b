"""peerkv's own steering (gateway/steering/steer.py, costs.py, load.py) in a simulated fleet.

It sees what the gateway would see: exact block tables; what engines report about themselves there; the gateway's own tickets;
and, at each first token, what was delivered.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from bench.simulate.jobs import Job, covered_tokens
from bench.simulate.policies import Choice
from bench.simulate.simulation import Fleet
from gateway.block_registry.chain import Chain
from gateway.planner.shortlist import ALL_MAX, HOLDERS_LOOKED_AT_MAX, best_first, shortlist, window
from gateway.steering.costs.model import CostModel, ModelKey, Outcome, pairs
from gateway.steering.evictions import Evictions
from gateway.steering.load import FleetLoad, Ticket
from gateway.steering.popularity import Popularity
from gateway.steering.steer import REMOTE_TRANSPORT, Candidate, Decision, PromptView, steer

PREFIXES_MAX = 65536
Reach = Literal["none", "host", "fleet"]


@dataclass(frozen=True, slots=True)
class _Words:
    """The load that an engine's table reports."""

    waiting_requests: int
    waiting_tokens: int
    decoding_requests: int


@dataclass(slots=True)
class PeerKV:
    """Steers `fleet`, whose replicas exchange KV as far as `reach`; `device` selects the cost model's priors."""

    fleet: Fleet
    reach: Reach = "fleet"
    device: str = "cuda"
    costs: CostModel = field(default_factory=CostModel)
    load: FleetLoad = field(default_factory=FleetLoad)
    popularity: Popularity = field(default_factory=lambda: Popularity(PREFIXES_MAX))
    evictions: Evictions = field(default_factory=Evictions)
    actions: dict[str, int] = field(default_factory=dict)
    _turn: int = 0
    _names: list[str] = field(init=False)
    _nodes: list[str] = field(init=False)
    _exchanges: list[frozenset[str]] = field(init=False)
    _key: ModelKey = field(init=False)
    _transport: str = field(init=False)
    _numbers: dict[str, int] = field(init=False)
    _said: list[tuple[int, int, int]] = field(init=False)
    _decisions: dict[int, tuple[Decision, Candidate, float]] = field(default_factory=dict)
    _tickets: dict[int, Ticket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        links = self.fleet.links
        self._names = [f"replica-{number}" for number in range(self.fleet.replicas)]
        self._nodes = [f"node-{number // links.profile.replicas_each_host}" for number in range(self.fleet.replicas)]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        hosts = self._nodes if self.reach == "host" else ["all"] * len(self._nodes)
        within: dict[str, set[str]] = {}
        for name, host in zip(self._names, hosts, strict=True):
            within.setdefault(host, set()).add(name)
        sets = {host: frozenset(names if self.reach != "none" else ()) for host, names in within.items()}
        self._exchanges = [sets[host] for host in hosts]
        self._key = ModelKey(self.device)
        self._said = [(0, 0, 0)] * self.fleet.replicas
        self.costs.transport_measured(REMOTE_TRANSPORT, links.profile.across_hosts_bytes_second)  # as nodes do at their start
        self.evictions.caches(dict.fromkeys(self._names, self.fleet.profile.engine.kv_tokens))
        self._transport = "cuda_ipc" if self.device == "cuda" else "shared_memory"

    def choose(self, job: Job, now: float) -> Choice:
        """As the planner does: look up, score, decide, and count the request as in flight."""
        request, size = job.request, self.fleet.trace_block_tokens
        keys = np.zeros((len(job.chain), 2), dtype="<u8")
        keys[:, 0] = job.chain
        chain = Chain.of(keys)
        candidates, held_most = self._candidates(job, chain, now)
        self._note(chain, candidates, held_most, now)
        prompt = PromptView(
            tokens=request.prompt_tokens,
            rate=self.popularity.rate(chain, held_most, now) if held_most else 0.0,
            decode_seconds=self.load.decode_seconds,
            block_size=self.fleet.profile.engine.block_tokens,
            again=self.evictions.again(),
        )
        decision = steer(prompt, candidates, self.costs, now, self._turn)
        self._turn += 1
        self.actions[decision.action.value] = self.actions.get(decision.action.value, 0) + 1
        expected = decision.expected
        cached = expected.local_tokens + expected.peer_tokens
        replica = self._numbers[decision.replica]
        chosen = next(each for each in candidates if each.name == decision.replica)
        self._decisions[job.tag] = (decision, chosen, now)
        tokens, ready_at = request.prompt_tokens, now + expected.seconds
        new = tokens - cached
        work = pairs(cached, new)
        ticket = Ticket(job.tag, decision.replica, decision.source, tokens, cached, new, work, ready_at, chain, size)
        self._tickets[job.tag] = ticket
        self.load.started(ticket, now)
        source = None if decision.source is None else self._numbers[decision.source]
        return Choice(replica, source, decision.import_tokens_max, cached)

    def _candidates(self, job: Job, chain: Chain, now: float) -> tuple[list[Candidate], int]:
        """Return the replicas that are weighed, as steering sees them, and the most blocks of the prompt that anybody holds.

        Of very many that is the planner's short list.
        """
        size, fleet = self.fleet.trace_block_tokens, self.fleet
        runs = fleet.published.runs(job.chain)
        whole = covered_tokens(len(job.chain), job.request.prompt_tokens, size, fleet.profile.engine.block_tokens)
        self._listen()
        loads, promises = self.load.load, self.load.promised(chain, size)
        exchanges, key, transport = self._exchanges, self._key, self._transport
        held, names, nodes = np.minimum(runs * size, whole), self._names, self._nodes
        candidates = [
            Candidate(
                names[number],
                int(held[number]),
                loads(names[number], now),
                exchanges[number],
                key,
                transport,
                promises.get(names[number], 0),
                True,
                nodes[number],
                self._room(number),
            )
            for number in self._weighed(runs, promises, now)
        ]
        return candidates, int(runs.max(initial=0))

    def _weighed(self, runs: npt.NDArray[np.int64], promises: Mapping[str, int], now: float) -> Iterable[int]:
        """Return the numbers of the replicas that are weighed, as `gateway.planner.shortlist` has it."""
        names = self._names
        if len(names) <= ALL_MAX:
            return range(len(names))
        best = np.argsort(-runs, kind="stable")[:HOLDERS_LOOKED_AT_MAX]
        holders = best_first((), promises, (names[number] for number in best.tolist() if runs[number]))
        idle = window(names, self._turn)
        return [self._numbers[name] for name in shortlist(self._numbers, holders, idle, lambda name: self.load.load(name, now))]

    def _note(self, chain: Chain, candidates: list[Candidate], held_most: int, now: float) -> None:
        """Count a request and learn what all caches evicted of its prompt: seen before, neither held nor being computed."""
        size = self.fleet.trace_block_tokens
        promised = max((each.promised_tokens for each in candidates), default=0)
        held = max(held_most, promised // size)
        _, lately, _ = self.popularity.note(chain, now, held, self.evictions.counts_since(now))
        if lately > held:
            self.evictions.missed((lately - held) * size, held * size)

    def _room(self, number: int) -> int:
        """Return the free tokens of a replica's cache."""
        cache = self.fleet.engines[number].cache
        return cache.capacity_tokens - cache.used_tokens

    def _listen(self) -> None:
        """Read every table's load and pass on what changed."""
        said = self._said
        for engine in self.fleet.engines:
            words = (len(engine.waiting), engine.waiting_tokens, engine.decoding)
            if words != said[engine.number]:
                said[engine.number] = words
                self.load.heard(self._names[engine.number], _Words(*words))

    def first_byte(self, job: Job, now: float) -> None:
        """Let the cost model learn from what was delivered."""
        self.load.first_byte(self._tickets[job.tag], now)
        given_up = self.fleet.engines[job.replica].cache.evicted_tokens
        self.evictions.gave_up(self._names[job.replica], 0, given_up, now)
        decision, candidate, asked = self._decisions.pop(job.tag)
        across = job.source is not None and self.fleet.links.across_hosts(job.source, job.replica)
        took = now - job.arrived + self.fleet.profile.engine.response_seconds
        if not self.costs.wants(self._key, decision.source, asked + took):
            return
        self.costs.observe(
            Outcome(
                key=self._key,
                replica=decision.replica,
                source=decision.source,
                transport=REMOTE_TRANSPORT if across else self._transport,
                load=candidate.load,
                now=asked,
                prompt_tokens=job.request.prompt_tokens,
                computed_tokens=job.computed_tokens,
                peer_tokens=job.peer_tokens,
                expected_seconds=decision.expected.seconds,
                first_byte_seconds=took,
                import_seconds=job.import_seconds if job.peer_tokens else None,
                import_bytes=job.peer_tokens * self.fleet.profile.engine.kv_bytes_token,
            )
        )

    def finished(self, job: Job, now: float) -> None:
        """Close its ticket."""
        self.load.finished(self._tickets.pop(job.tag), now)
