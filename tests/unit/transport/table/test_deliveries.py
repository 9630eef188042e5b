"""Delivery records, load words and per-peer counts: what the owner tells of itself, and what its readers make of it."""

import itertools
import threading
from contextlib import closing
from dataclasses import astuple

import hypothesis
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from tests.unit.transport.recorded_stores import RecordedStores
from tests.unit.transport.table_fixtures import writer
from transport.table.deliveries import OTHER_PEERS, SOURCES_MAX, Delivery, DeliveryReason, EngineLoad, FromSource
from transport.table.delivery_ring import DELIVERIES, WORDS, DeliveryRing, RingReader
from transport.table.peer_area import PEERS_MAX
from transport.table.reader import TableReader

RING = 4  # rows of the rings whose stores are taken apart
WORD = st.integers(0, 2**64 - 1)
NUMBERS = [name for name in Delivery.__struct_fields__ if name not in ("source", "why", "further")]
NAMES = ["replica-1", "replica-2", "a name — of another"]
FURTHER = st.builds(FromSource, st.sampled_from(NAMES), st.integers(0, 2**32 - 1))
PLAIN = {**dict.fromkeys(NUMBERS, WORD), "why": st.sampled_from(list(DeliveryReason))}
RECORDS = st.builds(Delivery, **PLAIN, source=st.sampled_from(["", *NAMES])) | st.builds(
    Delivery, **PLAIN, source=st.sampled_from(NAMES), further=st.lists(FURTHER, max_size=SOURCES_MAX - 1).map(tuple)
)


@given(st.lists(RECORDS, max_size=6), st.lists(RECORDS, max_size=6))
@settings(max_examples=60, deadline=None)
def test_records_come_out_as_they_went_in_each_once(tmp_path_factory, first, second):
    with closing(writer(tmp_path_factory.mktemp("t"))) as table, closing(TableReader(table.path)) as reader:
        for record in first:
            table.deliver(record, "shared_memory")
        cursor, found = reader.deliveries(0)
        assert (cursor, found) == (len(first), first)
        for record in second:
            table.deliver(record, "shared_memory")
        assert reader.deliveries(cursor) == (len(first) + len(second), second)


def test_without_new_records_the_cursor_stands_still(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        assert reader.deliveries(0) == (0, [])
        table.deliver(Delivery(tag=1), "")
        assert reader.deliveries(1) == (1, [])


def test_an_overrun_reader_gets_the_newest_records_and_can_tell_how_many_it_missed(tmp_path):
    written = DELIVERIES + 10
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        for tag in range(1, written + 1):
            table.deliver(Delivery(tag=tag), "")
        cursor, found = reader.deliveries(3)
        assert cursor == written
        assert [record.tag for record in found] == list(range(11, written + 1))
        assert cursor - 3 - len(found) == 7


def test_a_cursor_of_an_earlier_epoch_that_was_not_reached_yet_begins_anew(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.deliver(Delivery(tag=5), "")
        assert reader.deliveries(900) == (1, [Delivery(tag=5)])


def test_a_record_with_a_reason_or_a_source_that_there_is_not_is_left_out(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        for tag in (1, 2, 3):
            table.deliver(Delivery(tag=tag), "")
        table._deliveries._rows[0, -1] = len(DeliveryReason)
        table._deliveries._rows[1, -2] = 1
        assert reader.deliveries(0) == (3, [Delivery(tag=3)])


@pytest.mark.parametrize("place", [-3, -4])
def test_a_record_with_a_further_source_that_there_is_not_is_left_out(tmp_path, place):
    mixed = Delivery(tag=1, peer_tokens=96, source="a", further=(FromSource("b", 32), FromSource("a", 16)))
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        table.deliver(mixed, "shared_memory")
        table.deliver(structs.replace(mixed, tag=2), "shared_memory")
        table._deliveries._rows[0, place] = 3 << 32 | 16
        assert reader.deliveries(0) == (2, [structs.replace(mixed, tag=2)])


@pytest.mark.parametrize("further", [(FromSource("b", 2**32),), (FromSource("b", -1),), (FromSource("b", 1),) * SOURCES_MAX])
def test_more_sources_or_tokens_of_one_than_there_is_room_for_are_refused(tmp_path, further):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        with pytest.raises(ValueError, match="than can be"):
            table.deliver(Delivery(tag=1, source="a", further=further), "shared_memory")
        assert reader.deliveries(0) == (0, [])


def test_the_sources_of_a_record_add_up_to_what_was_imported():
    assert Delivery(source="a", planned_tokens=8).sources() == ()
    assert Delivery(source="a", peer_tokens=8).sources() == (FromSource("a", 8),)
    mixed = Delivery(source="a", peer_tokens=96, further=(FromSource("b", 32), FromSource("a", 16)))
    assert mixed.sources() == (FromSource("a", 48), FromSource("b", 32), FromSource("a", 16))


class Interleaved:
    """An array of which single words are loaded, after some of the writer's stores each."""

    def __init__(self, array, advance):
        self.array, self.advance = array, advance

    def __len__(self):
        return len(self.array)

    def __getitem__(self, place):
        wanted = np.arange(self.array.size).reshape(self.array.shape)[place]
        found = np.empty(wanted.shape, np.uint64)
        for at in np.ndindex(wanted.shape):
            self.advance()
            found[at] = self.array.reshape(-1)[wanted[at]]
        return found if found.shape else int(found)


class Unchecked:
    """Rows of which each number is the expected one, whenever it is looked at alone."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, place):
        return AlwaysEqual() if isinstance(place, int) else self.rows[place]


class AlwaysEqual:
    def __eq__(self, other):
        return True


def load(rows, offset):
    return tuple(rows[offset // 8 : offset // 8 + WORDS].tolist())


def record_of(number):
    """A record that tells of each of its words to which record it belongs."""
    numbers = [number * 1000 + place for place in range(len(NUMBERS) + SOURCES_MAX - 1)]
    return Delivery(*numbers[: len(NUMBERS)], further=tuple(FromSource("", each) for each in numbers[len(NUMBERS) :]))


def write(ring, number):
    ring.write(record_of(number), -1, [0] * (SOURCES_MAX - 1))


def whole(rows):
    return all(row[1:-2] == words_of(row[0]) for row in rows)


def words_of(number):
    record = record_of(number)
    return (*structs.astuple(record)[: len(NUMBERS)], *(1 << 32 | each.tokens for each in record.further))


def read_while_written(pace, before, during, *, checked=True):
    """Return what a reader gets of a ring of RING rows that has `before` records and is being given `during` more.

    `pace` stores happen before each of the reader's loads, in turn.
    """
    head, rows = np.zeros(1, np.uint64), np.zeros((RING, WORDS), np.uint64)
    stores: list = []
    ring = DeliveryRing(RecordedStores(head, stores), RecordedStores(rows, stores))

    def store(count):
        for array, place, value in stores[:count]:
            array[place] = value
        del stores[:count]

    for number in range(1, before + 1):
        write(ring, number)
    store(len(stores))
    for number in range(before + 1, before + during + 1):
        write(ring, number)
    turns = itertools.cycle(pace)
    seen = Interleaved(rows.reshape(-1), lambda: store(next(turns)))
    seen = seen if checked else Unchecked(seen)
    return RingReader(Interleaved(head, lambda: store(next(turns))), seen, load).read(0)


PACES = st.lists(st.integers(0, 40), min_size=1, max_size=12)


@given(PACES, st.integers(0, 9), st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_no_interleaving_lets_a_torn_record_be_read(pace, before, during):
    newest, rows = read_while_written(pace, before, during)
    assert whole(rows)
    numbers = [row[0] for row in rows]
    assert numbers == sorted(numbers)
    assert all(max(0, newest - RING) < number <= newest for number in numbers)


def test_an_undisturbed_reader_gets_every_record_that_the_ring_keeps():
    newest, rows = read_while_written([0], 7, 0)
    assert (newest, [row[0] for row in rows]) == (7, [4, 5, 6, 7])


def test_without_the_check_of_its_number_a_torn_record_is_read():
    torn = hypothesis.find(
        st.tuples(PACES, st.integers(0, 9), st.integers(0, 9)),
        lambda case: not whole(read_while_written(*case, checked=False)[1]),
        settings=settings(max_examples=1500, deadline=None, database=None),
    )
    assert torn[2] > 0


def test_a_reader_that_is_overtaken_loses_just_what_was_overwritten():
    newest, rows = read_while_written([1], 4, 2)  # loads and stores take turns: the first two rows change meanwhile
    assert newest == 4
    assert [row[0] for row in rows] == [3, 4]


def test_threads_read_no_torn_record_while_one_writes(tmp_path):
    """One thread overruns the ring many times, two read: every record's words belong together, none is seen twice."""
    rounds, wrong, counts = 5 * DELIVERIES, [], []
    done = threading.Event()

    def read(path):
        cursor = found = last = 0
        with closing(TableReader(path)) as reader:
            ended = False
            while not ended:
                ended = done.is_set()
                cursor, records = reader.deliveries(cursor)
                for record in records:
                    if len(set(structs.astuple(record)[: len(NUMBERS)])) != 1 or record.tag <= last:
                        wrong.append(record)
                    last = record.tag
                found += len(records)
        counts.append((cursor, found, last))

    with closing(writer(tmp_path)) as table:
        readers = [threading.Thread(target=read, args=(table.path,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        for tag in range(1, rounds + 1):
            table.deliver(Delivery(*[tag] * len(NUMBERS)), "")
        done.set()
        for reader in readers:
            reader.join(60)
    assert not wrong
    assert [(cursor, last) for cursor, _, last in counts] == [(rounds, rounds)] * 2
    assert all(found >= DELIVERIES for _, found, _ in counts)


def test_the_load_is_what_was_told_last(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        assert reader.load() == EngineLoad()
        table.tell_load((1, 2, 3, 4, 5, 6))
        assert reader.load() == EngineLoad(1, 2, 3, 4, 5, 6)
        table.tell_load((7, 8))
        assert reader.load() == EngineLoad(7, 8, 3, 4, 5, 6)


def test_imports_are_counted_by_peer(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        assert reader.peers() == ()
        table.imported("replica-1", "cuda_ipc", blocks=3, size=300, nanoseconds=30, failed=False)
        table.imported("replica-2", "cuda_ipc", blocks=0, size=0, nanoseconds=1, failed=True)
        assert [peer.name for peer in reader.peers()] == ["replica-1", "replica-2"]
        table.imported("replica-1", "cuda_ipc", blocks=1, size=100, nanoseconds=10, failed=True)
        table.imported("replica-3", "shared_memory", blocks=1, size=1, nanoseconds=1, failed=False)
        assert [astuple(peer) for peer in reader.peers()] == [
            ("replica-1", "cuda_ipc", 2, 4, 400, 40e-9, 1),
            ("replica-2", "cuda_ipc", 1, 0, 0, 1e-9, 1),
            ("replica-3", "shared_memory", 1, 1, 1, 1e-9, 0),
        ]


def test_peers_beyond_the_tables_room_are_counted_together(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        for number in range(PEERS_MAX + 5):
            table.imported(f"r{number}", "shared_memory", blocks=1, size=10, nanoseconds=1, failed=False)
        table.deliver(Delivery(source=f"r{PEERS_MAX + 2}"), "shared_memory")
        table.deliver(Delivery(source="r0"), "shared_memory")
        peers = reader.peers()
        assert len(peers) == PEERS_MAX
        assert (peers[-1].name, peers[-1].imports) == (OTHER_PEERS, 6)
        assert sum(peer.bytes for peer in peers) == 10 * (PEERS_MAX + 5)
        assert [record.source for record in reader.deliveries(0)[1]] == [OTHER_PEERS, "r0"]


def test_a_source_without_an_import_is_known_by_its_first_record(tmp_path):
    with closing(writer(tmp_path)) as table, closing(TableReader(table.path)) as reader:
        record = structs.replace(Delivery(tag=9), source="replica-4", why=DeliveryReason.SOURCE_GONE)
        table.deliver(record, "cuda_ipc")
        assert reader.deliveries(0) == (1, [record])
        assert astuple(reader.peers()[0]) == ("replica-4", "cuda_ipc", 0, 0, 0, 0, 0)
