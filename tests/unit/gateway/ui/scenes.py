"""Fleets as /kv/stats and /kv/prefixes show them, for tests of the page. Counts grow with each look."""

from __future__ import annotations

import time
from dataclasses import replace

from engine.frame_tiers.store import StoreStats
from gateway.kept_prefixes.book import KeptPrefixAnswer, PlaceState, PrefixPlace
from gateway.kept_prefixes.shapes import Prefix, PrefixReport
from gateway.ledger.stats import LedgerStats
from gateway.stats.node_stats import NodeStats
from gateway.stats.shapes import (
    HostMemoryStats,
    KvStats,
    PeerStats,
    ReplicaStats,
    TiersBelow,
    TokenCounts,
    Totals,
    TransferCounts,
)
from gateway.steering.outliers import OutlierState
from tests.unit.gateway.running_door import FakeSight
from transport.node.source_way import NETWORK
from transport.table.deliveries import EngineLoad

BLOCKS = 40_000


class Fleet(FakeSight):
    """`count` replicas on GPUs, of which the third has failed and the fourth is ejected. `looks` counts looks.

    `below` it are a disk, and a vault that does not answer; of the other `nodes` the second is not heard.
    """

    def __init__(self, count: int, *, host_memory: bool = False, below: bool = False, nodes: int = 0) -> None:
        super().__init__()
        self.count, self.host_memory, self.below, self.nodes, self.looks = count, host_memory, below, nodes, 0

    def stats(self, model: str = "") -> KvStats:
        self.looks += 1
        replicas = [self._replica(place) for place in range(self.count)]
        tokens = TokenCounts(
            **{field: sum(getattr(one.tokens, field) for one in replicas) for field in TokenCounts.model_fields}
        )
        ledger = LedgerStats(settled=400 * self.count)
        if self.count:
            ledger.requests |= {
                "none": 250 * self.count,
                "cold": 90 * self.count,
                "load": 40 * self.count,
                "evicted": 20 * self.count,
            }
            ledger.lost_tokens |= {"load": 120_000, "evicted": 90_000}
        empty = super().stats()
        return empty.model_copy(
            update={
                "model": "org/some-model-8B",
                "gateway": replace(
                    empty.gateway, version="0.1.0", uptime_seconds=5000.0 + self.looks, requests=400 * self.count
                ),
                "ledger": ledger,
                "totals": Totals(
                    replicas=self.count,
                    ready=max(0, self.count - 1),
                    blocks=BLOCKS * self.count,
                    cached_blocks=sum(one.cached_blocks for one in replicas),
                    in_flight=sum(one.in_flight for one in replicas),
                    tokens=tokens,
                    counts=TransferCounts(),
                ),
                "replicas": replicas,
                "host_memory": [self._tier(place) for place in range(self.count)] if self.host_memory else [],
                "tiers": self._tiers_below() if self.below else TiersBelow(),
                "nodes": [self._node(place) for place in range(self.nodes)],
            }
        )

    def _replica(self, place: int) -> ReplicaStats:
        grown = self.looks * 1000 * (1 + place % 3)
        local, peer, memory, computed = 900_000 + 5 * grown, 300_000 + 2 * grown, 40_000 + grown, 200_000 + 2 * grown
        failed, ejected = place == 2, place == 3
        return ReplicaStats(
            name=f"replica-{place}",
            state="failed" if failed else "ready",
            reason="CUDA out of memory; lower --gpu-memory-utilization" if failed else "",
            device=f"cuda:{place % 8}",
            restarts=5 if failed else 0,
            standing=OutlierState.EJECTED if ejected else OutlierState.WELL,
            standing_reason="3 answers in a row failed, the last with status 500" if ejected else "",
            epochs=1,
            exchanges="ok",
            transport="cuda_ipc",
            fingerprint="ab" * 16,
            incompatible={},
            groups=[],
            block_size=16,
            blocks=BLOCKS,
            cached_blocks=(place * 7919) % BLOCKS,
            in_flight=0 if failed else place % 9,
            load=EngineLoad(waiting_requests=place % 4, decoding_requests=place % 6),
            tokens=TokenCounts(
                prompt=local + peer + memory + computed, local=local, peer_cuda_ipc=peer, host_memory=memory, computed=computed
            ),
            counts=TransferCounts(),
            peers=[
                PeerStats(
                    name=f"replica-{(place + step) % self.count}",
                    transport="cuda_ipc",
                    imports=120 + self.looks,
                    blocks=9000 + grown,
                    bytes=(9000 + grown * step) << 16,
                    seconds=4.2,
                    failures=place % 2,
                    gigabytes_per_second=140.0,
                )
                for step in range(1, min(4, self.count))
            ]
            + [self._from(f"node-{'bcdefgh'[other]}:replica-0", grown) for other in range(self.nodes) if place == 0],
        )

    def _tier(self, place: int) -> HostMemoryStats:
        return HostMemoryStats(
            name=f"replica-{place}.host-memory",
            replica=f"replica-{place}",
            blocks=9000,
            stored_blocks=4000 + place,
            bytes=1 << 33,
        )

    def _from(self, name: str, grown: int) -> PeerStats:
        """What came from another node."""
        return PeerStats(
            *(name, NETWORK, 12, 800 + grown // 10, (800 + grown // 10) << 16, 2.5, 0),
            gigabytes_per_second=1.1,
        )

    def _tiers_below(self) -> TiersBelow:
        frames = 60_000 + 100 * self.looks
        disk = StoreStats(
            name="disk", frames=frames, bytes=frames << 16, bytes_max=1 << 33, stored_frames=frames, stored_bytes=frames << 16,
            evicted_frames=1200, found_frames=9000, found_bytes=(9000 + 50 * self.looks) << 16, missed_frames=70,
            read_seconds=0.8,
        )  # fmt: skip
        vault = StoreStats(
            name="vault", state="vault.example:6379 does not answer: timed out", stored_frames=500, stored_bytes=500 << 16,
            dropped_frames=40, errors=3,
        )  # fmt: skip
        counts = {"promotions": 320, "promotions_late": 4, "import_blocks": 8800, "import_failures": 2, "lost_blocks": 17}
        return TiersBelow(stores=[disk, vault], **counts)

    def _node(self, place: int) -> NodeStats:
        heard = place != 1
        return NodeStats(
            name=f"node-{'bcdefgh'[place]}",
            address=f"10.0.0.{place + 2}:7400",
            trouble="" if heard else "it says nothing: no route to host",
            losses=0 if heard else 3,
            transport="tcp" if place % 2 else "nixl",
            transport_reason="as measured",
            tcp_bytes_per_second=1.2e9,
            nixl_bytes_per_second=0 if place % 2 else 11e9,
            fetches=90,
            fetched_blocks=7000,
            fetched_bytes=(7000 + (80 * self.looks if heard else 0)) << 16,
            fetch_seconds=1.8,
            failed_blocks={"changed": 3, "silent": 0 if heard else 128},
        )

    def prefixes(self, limit: int, model: str = "") -> PrefixReport:
        now = time.time()
        top = [
            Prefix(
                key=f"{place:02x}" * 16,
                tokens=4096 >> place % 4,
                requests=900 - 50 * place,
                last_used=now - 7 * place,
                holders=[f"replica-{holder}" for holder in range(self.count) if holder % (place + 1) == 0],
            )
            for place in range(min(limit, 12 if self.count else 0))
        ]
        places = [
            PrefixPlace("replica-0", PlaceState.PINNED),
            PrefixPlace("replica-1", PlaceState.REFUSED, reason="pins would take more than a quarter of the blocks"),
        ]
        kept = KeptPrefixAnswer(
            id="1f2e3d4c5b6a7988", tenant="team-a", model="", tokens=2048, whole_tokens=2048, pin=True, renew=False,
            ttl=3600.0, created=now, expires=now + 1800, places=places,
        )  # fmt: skip
        return PrefixReport(tracked_blocks=0, tracked_blocks_max=1, prefixes=top, kept=[kept] if self.count else [])
