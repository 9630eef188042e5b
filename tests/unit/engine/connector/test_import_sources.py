"""Which sources an import has: the longest run first, and behind its end whoever goes on, as long as anybody does."""

import random
from contextlib import ExitStack, closing

import pytest

from engine.connector.import_sources import UNREADABLE_MAX, Peers
from tests.unit.engine.connector.scheduler_fixtures import FINGERPRINT, PLAIN, SIZE, keys_of
from tests.unit.transport.table_fixtures import FIELDS, writer
from transport.table.deliveries import SOURCES_MAX, DeliveryReason
from transport.table.directory import TableDirectory
from transport.table.reader import TableReader

BLOCKS = 12
KEYS = keys_of(range(BLOCKS * SIZE))
NAMES = ("replica-0", "replica-0.host-memory", "replica-1", "disk", "node-b:replica-0")


class Holders:
    """Tables by name, which offer what a test says, each block in another place."""

    def __init__(self, path, chance) -> None:
        self.refused = 0
        self.stack = ExitStack()
        self.places = {name: chance.sample(range(BLOCKS), BLOCKS) for name in NAMES}
        self.tables = {name: self.stack.enter_context(closing(writer(path, name, BLOCKS))) for name in NAMES}
        directory = TableDirectory(path, "me")
        about = {"groups": PLAIN, "hash_name": "xxh3_128", "transport": "shared_memory"}
        self.peers = Peers(directory, FINGERPRINT, FIELDS, refused=self.refuse, **about)
        self.stack.enter_context(closing(self.peers))

    def refuse(self) -> None:
        self.refused += 1

    def offer(self, **held) -> None:
        """Have the tables offer these blocks of the chain, and no others."""
        for name, table in self.tables.items():
            table.clear()
            blocks = sorted(held.get(name, ()))
            if blocks:
                table.publish([self.places[name][block] for block in blocks], KEYS[blocks])

    def best(self, source=None, begin=0, end=BLOCKS):
        """The sources with the blocks that each gives, and why there are no more."""
        parts, why = self.peers.best(source, KEYS[:end], begin * SIZE, end * SIZE)
        found, at = [], begin
        for part in parts:
            assert (part.begin, part.epoch) == (at * SIZE, self.tables[part.source].epoch)
            at = part.end // SIZE
            assert part.source_blocks.tolist() == self.places[part.source][part.begin // SIZE : at]
            with closing(TableReader(self.tables[part.source].path)) as reader:
                assert reader.unchanged(part.source_blocks, part.states).all()
            found.append((part.source, range(part.begin // SIZE, at)))
        return found, why


@pytest.fixture
def holders(tmp_path):
    made = Holders(tmp_path, random.Random(7))
    with made.stack:
        yield made


def run_end(held, begin, end):
    return next((block for block in range(begin, end) if block not in held), end)


def reachable(held, begin, end, sources, first=NAMES):
    """How far so many sources bring one, cut anywhere; those behind the first are this node's."""
    ends = {begin}
    for _ in range(sources):
        ends |= {cut for at in ends for name in first for cut in range(at + 1, run_end(held[name], at, end) + 1)}
        first = NAMES[:-1]
    return max(ends)


def test_no_choice_of_as_many_sources_reaches_further(holders):
    chance, mixed = random.Random(3), 0
    for _ in range(300):
        held = {name: set(chance.sample(range(BLOCKS), chance.choice((0, 3, 6, 9, 11)))) for name in NAMES}
        begin, end = sorted(chance.sample(range(BLOCKS + 1), 2))
        holders.offer(**held)
        source = chance.choice((None, *NAMES))
        found, why = holders.best(source, begin, end)
        reached = found[-1][1].stop if found else begin
        if source is None:
            assert reached == reachable(held, begin, end, SOURCES_MAX)
        elif begin in held[source]:
            assert found[0] == (source, range(begin, run_end(held[source], begin, end)))
            assert reached == reachable(held, found[0][1].stop, end, SOURCES_MAX - 1, NAMES[:-1])
        elif begin - 1 in held[source]:
            assert reached == reachable(held, begin, end, SOURCES_MAX, NAMES[:-1])
        else:
            assert reached == begin
        assert all(block in held[name] for name, blocks in found for block in blocks)
        assert all(blocks for _, blocks in found)
        assert why is (DeliveryReason.NONE if reached == end else DeliveryReason.SOURCE_HELD_LESS)
        mixed += len(found) > 1
    assert mixed > 50


def test_head_middle_and_tail_come_from_three(holders):
    holders.offer(**{"disk": range(3), "replica-0": range(7), "replica-0.host-memory": range(5, 10)})
    three = [("disk", range(3)), ("replica-0", range(3, 7)), ("replica-0.host-memory", range(7, 10))]
    assert holders.best("disk") == (three, DeliveryReason.SOURCE_HELD_LESS)
    assert holders.best("disk", end=10) == (three, DeliveryReason.NONE)
    assert holders.best(None, end=10)[0] == [("replica-0", range(7)), ("replica-0.host-memory", range(7, 10))]


def test_no_request_has_more_sources_than_there_is_room_for_in_its_record(holders):
    holders.offer(**{"disk": (0, 2, 4), "replica-0": (1, 3, 5)})
    assert [name for name, _ in holders.best()[0]] == ["disk", "replica-0", "disk"]


def test_a_source_that_would_bring_little_at_the_end_is_left_out_and_between_two_others_it_is_not(tmp_path):
    blocks = 100
    keys = keys_of(range(blocks * SIZE))
    with ExitStack() as stack:
        made = [stack.enter_context(closing(writer(tmp_path, name, blocks))) for name in ("a", "b", "c")]
        about = {"groups": PLAIN, "hash_name": "xxh3_128", "transport": "shared_memory"}
        peers = Peers(TableDirectory(tmp_path, "me"), FINGERPRINT, FIELDS, refused=lambda: None, **about)
        stack.enter_context(closing(peers))
        for cuts, sources in (((97,), "a"), ((93,), "ab"), ((50, 52), "abc"), ((50, 98), "ab"), ((96, 98), "a")):
            for table, begin, end in zip(made, (0, *cuts), (*cuts, blocks), strict=False):
                table.clear()
                table.publish(range(begin, end), keys[begin:end])
            parts, why = peers.best("a", keys, 0, blocks * SIZE)
            assert "".join(part.source for part in parts) == sources
            assert (why is DeliveryReason.NONE) is (parts[-1].end == blocks * SIZE)


def test_where_one_source_has_all_nobody_else_is_looked_up(holders, monkeypatch):
    called = []
    for name in ("longest_run", "holds"):
        method = getattr(TableReader, name)

        def counting(reader, *given, name=name, method=method):
            called.append((name, reader.name))
            return method(reader, *given)

        monkeypatch.setattr(TableReader, name, counting)
    holders.offer(**{"replica-1": range(BLOCKS), "replica-0": range(4)})
    holders.best("replica-1")
    assert called == [("longest_run", "replica-1")]
    called.clear()
    holders.best("replica-0", end=4)
    assert called == [("longest_run", "replica-0")]
    holders.offer(**{"replica-0": range(4)})  # the rest is nobody's: one probe of each
    called.clear()
    holders.best("replica-0")
    assert called[0] == ("longest_run", "replica-0")
    assert sorted(called[1:]) == sorted(("holds", name) for name in NAMES)


def test_only_who_exchanges_and_can_be_read_goes_on(holders, tmp_path):
    holders.offer(**{"replica-0": range(3), "replica-1": range(6)})
    assert holders.best("replica-0")[0] == [("replica-0", range(3)), ("replica-1", range(3, 6))]
    for _ in range(UNREADABLE_MAX):
        holders.peers.not_read("replica-1", holders.tables["replica-1"].epoch)
    assert holders.best("replica-0")[0] == [("replica-0", range(3))]
    with closing(writer(tmp_path, "other-model", BLOCKS, fields=FIELDS | {"dtype": "float16"})) as other:
        other.publish(range(BLOCKS), KEYS)
        assert holders.best("replica-0")[0] == [("replica-0", range(3))]
        assert holders.refused == 1


def test_who_is_gone_or_refused_is_not_replaced_by_another(holders):
    """The gateway chose among what it saw: it plans anew."""
    holders.offer(**{"replica-1": range(6)})
    assert holders.best("replica-7") == ([], DeliveryReason.SOURCE_GONE)
