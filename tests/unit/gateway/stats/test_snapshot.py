"""/kv/stats: what it says of replicas, of lives that ended, and in all."""

from pathlib import Path

import pytest

from engine.fleet import ReplicaState
from engine.frame_tiers.vault.address import parse
from engine.joined_fleet import NodesTold, NodeTold, WayTold, write_nodes
from gateway import __version__
from gateway.ledger.attempts import RequestInfo
from gateway.ledger.ledger import Ledger
from gateway.ledger.misses import MissReason
from gateway.ledger.recorder import Recorder
from gateway.limits.shared.shared_limits import SharedLimits
from gateway.planner.planner import Planner
from gateway.prompts.parity import KindVerdict, Parity, ParityCounts, ParityVerdict
from gateway.prompts.tokenizer.model_files import TokenizerSource
from gateway.prompts.tokenizer.service import TokenService
from gateway.relay.counters import RelayCounters
from gateway.stats.node_stats import node_stats
from gateway.stats.process_figures import ProcessFigures
from gateway.stats.shapes import KvStats, TokenCounts, TransferCounts
from gateway.stats.snapshot import StatsView
from gateway.tenants.tenants import ANONYMOUS
from tests.unit.gateway.ledger.begun_attempts import begun
from tests.unit.gateway.planner.planned_fleet import Bounds
from tests.unit.transport.replica_tables import FIELDS, ReplicaTables, StandingFleet
from transport.groups import Group
from transport.node.messages import FleetTold
from transport.table.deliveries import Delivery, EngineLoad
from transport.table.directory import TableDirectory
from transport.table.layout import COUNTERS


class Scene:
    def __init__(self, tables: ReplicaTables) -> None:
        self.tables = tables
        self.fleet = StandingFleet("a", "b", directory=tables.directory)
        tokens = TokenService(TokenizerSource("/no/model/here"))
        self.planner = Planner(self.fleet, TableDirectory(tables.directory), tokens, Bounds())
        self.now = 100.0
        self.door = RelayCounters(requests=7, retries=1), 2
        self.recorder = Recorder(Ledger(10), self.planner, lambda: self.now)
        self.view = StatsView(self.fleet, self.planner, tokens, self.recorder, lambda: self.now)
        shared = SharedLimits(parse("valkey://127.0.0.1:1"), wait_seconds_max=1.0)  # which is not connected to
        self.process = ProcessFigures(lambda: self.door, shared_limits=shared, clock=lambda: self.now)

    def snapshot(self) -> KvStats:
        return self.view.snapshot(self.process.stats())

    def count(self, name: str, **counts: int) -> None:
        for counter, amount in counts.items():
            self.tables.writers[name].count(counter, amount)


@pytest.fixture
def scene(two_tables: ReplicaTables) -> Scene:
    return Scene(two_tables)


def test_tokens_are_shown_by_where_they_came_from_and_add_up(scene: Scene) -> None:
    scene.count("a", prompt_tokens=100, local_tokens=20, peer_tokens_shared_memory=30, computed_tokens=50)
    scene.count("b", prompt_tokens=10, peer_tokens_cuda_ipc=4, computed_tokens=6, import_nanoseconds=1_500_000_000)
    stats = scene.snapshot()
    first, second = stats.replicas
    assert first.tokens == TokenCounts(prompt=100, local=20, peer_shared_memory=30, peer_cuda_ipc=0, computed=50)
    assert sum(first.tokens.by_source().values()) == first.tokens.prompt
    assert second.counts.import_seconds == 1.5
    assert stats.totals.tokens == TokenCounts(prompt=110, local=20, peer_shared_memory=30, peer_cuda_ipc=4, computed=56)


def test_other_nodes_are_shown_with_how_their_blocks_come(tmp_path: Path) -> None:
    assert node_stats(tmp_path) == []
    way = WayTold("nixl", "it is sooner", 1e9, 2e10)
    nodes = (NodeTold("node-b", "10.0.0.2:7710", FleetTold(), way=way), NodeTold("node-c", "10.0.0.3:7710", trouble="gone"))
    write_nodes(tmp_path, NodesTold("node-a", nodes))
    first, second = node_stats(tmp_path)
    assert (first.name, first.trouble, first.transport, first.transport_reason) == ("node-b", "", "nixl", "it is sooner")
    assert (first.tcp_bytes_per_second, first.nixl_bytes_per_second) == (1e9, 2e10)
    assert (second.trouble, second.transport) == ("gone", "tcp")


def test_every_counter_of_the_tables_is_shown() -> None:
    tokens = {"prompt_tokens", "local_tokens", "computed_tokens", "peer_tokens_shared_memory", "peer_tokens_cuda_ipc"}
    tokens |= {"tier_tokens_host_memory", "tier_tokens_disk", "tier_tokens_vault", "tier_dropped_blocks", "tier_ahead_blocks"}
    shown = {name.replace("import_seconds", "import_nanoseconds") for name in TransferCounts.model_fields}
    assert set(COUNTERS) == tokens | shown


def test_what_a_replica_counted_before_its_restart_stays_in_the_totals(scene: Scene) -> None:
    scene.count("a", prompt_tokens=100)
    scene.snapshot()
    scene.count("a", prompt_tokens=5)  # after the last look, before its end
    scene.tables.stop("a")
    assert scene.snapshot().totals.tokens.prompt == 105
    scene.tables.start("a")
    scene.count("a", prompt_tokens=7)
    stats = scene.snapshot()
    assert (stats.totals.tokens.prompt, stats.replicas[0].tokens.prompt, stats.replicas[0].epochs) == (112, 112, 2)
    assert scene.snapshot().totals.tokens.prompt == 112


def test_a_replica_that_left_the_fleet_still_counts_in_all(scene: Scene) -> None:
    scene.tables.start("z")
    scene.count("z", imports=3)
    scene.snapshot()
    scene.tables.stop("z")
    stats = scene.snapshot()
    assert [replica.name for replica in stats.replicas] == ["a", "b"]
    assert stats.totals.counts.imports == 3


async def test_a_replica_says_what_groups_its_cache_has(scene: Scene) -> None:
    scene.tables.stop("a")
    scene.tables.start("a", groups=(Group("full", 4, 0, 2, 512), Group("window", 4, 6, 3, 768)))
    full, window = scene.snapshot().replicas[0].groups
    assert (full.kind, full.layers, full.block_size, full.window, full.block_bytes) == ("full", 2, 4, 0, 512)
    assert (window.kind, window.window) == ("window", 6)
    assert (full.token_bytes, full.import_bytes) == (128, 0)
    assert (window.token_bytes, window.import_bytes) == (0, 2 * 768)  # five tokens before the next one, in blocks of four


async def test_replicas_are_shown_with_state_blocks_and_requests(scene: Scene) -> None:
    scene.tables.hold("a", list(range(8)))
    scene.fleet.set("b", ReplicaState.BACKOFF, reason="killed by signal 9", restarts=3)
    scene.recorder.begin(
        await scene.planner.plan("completions", {"prompt": [1, 2]}, ANONYMOUS), RequestInfo("r", "completions", "", "")
    )
    stats = scene.snapshot()
    first, second = stats.replicas
    assert (first.state, first.blocks, first.cached_blocks, first.block_size, first.in_flight) == ("ready", 256, 2, 4, 1)
    assert (second.state, second.reason, second.restarts) == ("backoff", "killed by signal 9", 3)
    assert (first.exchanges, first.transport, len(first.fingerprint)) == ("ok", "shared_memory", 32)
    assert (stats.totals.ready, stats.totals.replicas, stats.totals.blocks, stats.totals.cached_blocks) == (1, 2, 512, 2)
    assert stats.steering.planned == 1


def test_replicas_that_can_not_exchange_name_the_field(scene: Scene) -> None:
    scene.tables.stop("b")
    scene.tables.start("b", fields={**FIELDS, "dtype": "float32"})
    first, second = scene.snapshot().replicas
    assert first.incompatible == {"b": ["dtype: bfloat16 here, float32 there"]}
    assert second.incompatible == {"a": ["dtype: float32 here, bfloat16 there"]}


def test_a_replica_without_a_table_is_said_to_have_none(scene: Scene) -> None:
    scene.tables.stop("b")
    second = scene.snapshot().replicas[1]
    assert (second.exchanges, second.blocks, second.fingerprint) == ("it has no block table", 0, "")


def test_the_gateways_own_counts_age_and_parity_are_shown(scene: Scene) -> None:
    scene.now = 160.0
    scene.planner.prompts.parity = ParityVerdict(KindVerdict(Parity.DEGRADED, 3, ("emoji: …",), "1 of 3"), KindVerdict(), "a")
    scene.planner.prompts.parity_counts = ParityCounts(checks=3, failures=1, differences_found=2)
    stats = scene.snapshot()
    assert (stats.gateway.version, stats.gateway.uptime_seconds) == (__version__, 60.0)
    assert (stats.gateway.requests, stats.gateway.retries, stats.gateway.in_flight, stats.gateway.refused) == (7, 1, 2, 0)
    assert (stats.parity.completions.parity, stats.parity.completions.differences) == ("degraded", ("emoji: …",))
    assert (stats.parity.replica, stats.parity.chat.parity) == ("a", "unknown")
    assert (stats.parity.checks, stats.parity.failures, stats.parity.differences_found) == (3, 1, 2)
    assert (stats.model, stats.tokenizer.loaded) == ("model", False)


def test_the_body_survives_json(scene: Scene) -> None:
    stats = scene.snapshot()
    assert KvStats.model_validate_json(stats.model_dump_json()) == stats


def test_imports_are_shown_by_peer_and_transport_with_their_rate_over_all_lives(scene: Scene) -> None:
    scene.tables.writers["a"].imported("b", "shared_memory", blocks=3, size=6_000_000, nanoseconds=2_000_000, failed=False)
    scene.snapshot()
    scene.tables.stop("a")
    scene.tables.start("a")
    scene.tables.writers["a"].imported("b", "shared_memory", blocks=1, size=2_000_000, nanoseconds=2_000_000, failed=True)
    (peer,) = scene.snapshot().replicas[0].peers
    assert (peer.name, peer.transport, peer.imports, peer.blocks, peer.failures) == ("b", "shared_memory", 2, 4, 1)
    assert (peer.bytes, peer.seconds, peer.gigabytes_per_second) == (8_000_000, 0.004, 2.0)


def test_the_engines_load_is_shown_and_that_of_a_replica_without_a_table_is_nothing(scene: Scene) -> None:
    scene.tables.writers["a"].tell_load([1, 2, 300, 4, 5, 6])
    scene.tables.stop("b")
    first, second = scene.snapshot().replicas
    assert first.load == EngineLoad(
        waiting_requests=1, running_requests=2, waiting_tokens=300, decoding_requests=4, imports_under_way=5, pinned_blocks=6
    )
    assert second.load == EngineLoad()


def test_the_ledger_shows_every_reason_and_the_costs_what_was_learnt(scene: Scene) -> None:
    scene.planner.fleet.now()
    attempt = begun(7)
    scene.recorder.ledger.open(attempt)
    record = Delivery(tag=7, scheduled_ns=1, first_token_ns=2, prompt_tokens=100, computed_tokens=100)
    scene.tables.writers["a"].deliver(record, "shared_memory")
    scene.recorder.ended(attempt, 200)
    stats = scene.snapshot()
    assert set(stats.ledger.requests) == set(stats.ledger.lost_tokens) == {reason.value for reason in MissReason}
    assert (stats.ledger.requests["cold"], stats.ledger.settled, stats.ledger.computed_tokens) == (1, 1, 100)
    assert (stats.costs.samples, stats.costs.median_error) == (0, None)


def test_host_memory_is_shown_with_what_all_replicas_restored(scene: Scene) -> None:
    assert scene.snapshot().host_memory == []
    stored = scene.tables.start("a.host-memory", blocks=64)
    scene.tables.hold("a.host-memory", range(40))
    stored.count("tier_dropped_blocks", 3)
    stored.count("tier_ahead_blocks", 7)
    for name, blocks in (("a", 5), ("b", 2)):
        scene.tables.writers[name].imported(
            "a.host-memory", "shared_memory", blocks=blocks, size=100 * blocks, nanoseconds=1, failed=name == "b"
        )
        scene.count(name, prompt_tokens=10, tier_tokens_host_memory=8, computed_tokens=2)
    stats = scene.snapshot()
    (tier,) = stats.host_memory
    assert (tier.name, tier.replica, tier.blocks, tier.stored_blocks) == ("a.host-memory", "a", 64, 10)
    assert (tier.stores, tier.evictions, tier.ahead_blocks, tier.dropped_blocks) == (10, 0, 7, 3)
    assert (tier.imports, tier.import_blocks, tier.import_bytes, tier.import_failures) == (2, 7, 700, 1)
    assert stats.totals.tokens.host_memory == 16
    assert [replica.name for replica in stats.replicas] == ["a", "b"]
