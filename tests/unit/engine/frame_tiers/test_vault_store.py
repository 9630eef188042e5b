"""Frames in a vault: what comes back, and what one that is gone, slow, full or mad costs."""

import time
from dataclasses import replace

import pytest

from engine.frame_tiers.vault import vault_store
from engine.frame_tiers.vault.address import AddressRefused, parse, with_secrets
from engine.frame_tiers.vault.connection import Connection
from engine.frame_tiers.vault.resp import VaultGone, read_reply
from engine.frame_tiers.vault.server import VaultServer
from engine.frame_tiers.vault.vault_store import PREFIX, VaultStore
from tests.unit.engine.frame_tiers.frames import SIZE, entries, fetched, frame, ids, soon, whole
from tests.unit.engine.frame_tiers.vault_servers import PASSWORD, Server, answering, tls_in_front, valkey


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with valkey(tmp_path_factory.mktemp("vault")) as running:
        yield running


@pytest.fixture
def store(server):
    made = VaultStore(server.address)
    yield made
    made.flush()
    made.close()


def beginning(answer):
    """A case's name."""
    return repr(answer[:20])


def asked(address, *commands):
    connection = Connection(address, None, soon())
    try:
        return connection.call(commands, soon())
    finally:
        connection.close()


def test_frames_come_back_byte_for_byte_in_one_round_trip_a_connection(store, server):
    store.put(entries(range(100)))
    (before,) = asked(server.address, [b"INFO", b"commandstats"])
    assert fetched(store, [*range(100), 200]) == {number: frame(number) for number in range(100)}
    (after,) = asked(server.address, [b"INFO", b"commandstats"])
    assert calls(after) - calls(before) == vault_store.CONNECTIONS
    counts = store.stats()
    assert (counts.stored_frames, counts.found_frames, counts.missed_frames, counts.state) == (100, 100, 1, "ok")
    assert store.holds(ids([5, 500]), soon()) == [True, False]


def calls(info):
    line = next((line for line in info.decode().splitlines() if line.startswith("cmdstat_mget:")), "calls=0,")
    return int(line.split("calls=")[1].split(",")[0])


def test_what_is_there_already_is_not_sent_again(store):
    store.put(entries([1, 2]))
    store.put(entries([2, 3]))
    assert store.stats().stored_frames == 3


@pytest.mark.parametrize("miss", [lambda store: fetched(store, [1, 2]), lambda store: store.holds(ids([1, 2]), soon())])
def test_what_expired_or_gave_way_is_sent_again_once_it_was_missed(store, server, miss):
    store.put(entries([1, 2]))
    asked(server.address, [b"UNLINK", vault_store._key(ids([1])[0])])
    assert [store.knows(each) for each in ids([1, 2])] == [True, True]
    miss(store)
    assert [store.knows(each) for each in ids([1, 2])] == [False, True]


def test_values_larger_than_any_buffer_and_empty_ones_come_whole(store, server):
    large = bytes(range(256)) * (40 << 10)
    asked(server.address, [b"SET", vault_store._key(ids([1])[0]), large], [b"SET", vault_store._key(ids([2])[0]), b""])
    assert fetched(store, [1, 2, 3], lambda number, data: True) == {1: large, 2: b""}


def test_frames_expire(server):
    store = VaultStore(server.address, ttl_seconds=100)
    store.put(entries([1]))
    (left,) = asked(server.address, [b"PTTL", vault_store._key(ids([1])[0])])
    assert 0 < left <= 100_000
    store.flush()
    store.close()


def test_a_flush_removes_our_frames_and_nothing_else(store, server):
    asked(server.address, [b"SET", b"somebody's", b"value"])
    store.put(entries(range(50)))
    assert store.flush() == ""
    assert asked(server.address, [b"KEYS", b"*"]) == [[b"somebody's"]]
    asked(server.address, [b"DEL", b"somebody's"])


def test_what_is_no_good_frame_is_counted_and_removed(store, server):
    store.put(entries([1, 2]))
    asked(server.address, [b"SET", vault_store._key(ids([1])[0]), frame(1)[:-1] + b"!"])
    assert fetched(store, [1, 2], whole)[2] == frame(2)
    assert (store.stats().damaged_frames, store.stats().found_frames) == (1, 1)
    assert store.holds(ids([1, 2]), soon()) == [False, True]


def test_it_says_how_full_it_is(store):
    store.put(entries(range(10)))
    store.tend()
    counts = store.stats()
    assert (counts.frames, counts.bytes_max) == (10, 64 << 20)
    assert counts.bytes > 10 * SIZE


def test_a_wrong_password_is_a_miss_with_a_word(server):
    store = VaultStore(replace(server.address, password="wrong"))
    store.put(entries([1]))
    assert fetched(store, [1]) == {}
    counts = store.stats()
    assert (counts.dropped_frames, counts.missed_frames, counts.errors) == (1, 1, 1)
    assert "WRONGPASS" in counts.state
    assert "wrong" not in counts.state.replace("WRONGPASS", "")


def test_with_tls_frames_come_back_from_the_named_server_alone(server, tmp_path):
    with tls_in_front(server.address, tmp_path) as address:
        store = VaultStore(address)
        store.put(entries(range(40)))
        assert fetched(store, range(40)) == {number: frame(number) for number in range(40)}
        store.flush()
        store.close()
        stranger = VaultStore(replace(address, host="127.0.0.1"))  # not the name in its certificate
        assert fetched(stranger, [1]) == {}
        assert "certificate" in stranger.stats().state.lower()
        stranger.close()


def test_a_vault_that_dies_is_a_miss_at_once_and_is_found_again(tmp_path):
    now = [0.0]
    server = Server(tmp_path)
    server.start()
    store = VaultStore(server.address, clock=lambda: now[0])
    store.put(entries([1]))
    server.kill()
    assert fetched(store, [1]) == {}
    assert not store.ready()
    assert store.stats().state.startswith("gone")
    errors = store.stats().errors
    store.put(entries([2]))
    assert (store.stats().dropped_frames, store.stats().errors) == (1, errors)  # it was not even asked
    server.start()
    now[0] += vault_store.DOWN_SECONDS_MIN
    store.put(entries([3]))
    assert fetched(store, [1, 3]) == {3: frame(3)}
    assert store.stats().state == "ok"
    server.kill()
    store.close()


def test_a_full_vault_that_gives_nothing_up_takes_nothing_and_says_so(store, server):
    asked(server.address, [b"CONFIG", b"SET", b"maxmemory", b"1"], [b"CONFIG", b"SET", b"maxmemory-policy", b"noeviction"])
    store.put(entries([1, 2]))
    asked(
        server.address, [b"CONFIG", b"SET", b"maxmemory", b"67108864"], [b"CONFIG", b"SET", b"maxmemory-policy", b"allkeys-lfu"]
    )
    assert (store.stats().dropped_frames, store.stats().stored_frames) == (2, 0)
    assert "OOM" in store.stats().state
    store.put(entries([1]))
    assert store.stats().state == "ok"


def test_a_vault_that_gives_up_what_is_asked_for_least_stays_within_its_memory(tmp_path):
    with valkey(tmp_path, bytes_max=3 << 20) as server:
        store = VaultStore(server.address)
        large = [(ids([n])[0], frame(n) + bytes(100_000)) for n in range(60)]
        store.put(large)
        assert store.stats().stored_frames == 60
        assert 0 < sum(store.holds(ids(range(60)), soon())) < 40
        store.close()


@pytest.mark.parametrize(
    ("answer", "every"),
    [(b"", 0), (b"*1\r\n$1000\r\n" + bytes(1000), 0.02)],
    ids=["says nothing", "sends a byte now and then"],
)
def test_a_vault_that_hangs_costs_one_deadline_and_then_nothing(answer, every):
    with answering(answer, every) as address:
        store = VaultStore(address)
        began = time.monotonic()
        assert fetched(store, [1], deadline=soon(0.3)) == {}
        assert 0.25 < time.monotonic() - began < 2.0
        began = time.monotonic()
        assert fetched(store, [1], deadline=soon(5.0)) == {}
        assert time.monotonic() - began < 0.2
        assert store.stats().missed_frames == 2
        assert "in time" in store.stats().state


def test_too_short_a_deadline_says_nothing_about_the_vault():
    with answering(b"") as address:
        store = VaultStore(address)
        assert fetched(store, [1], deadline=soon(0.05)) == {}
        assert store.ready()
        assert store.stats().errors == 1


def test_a_vault_that_gives_a_part_in_time_is_not_taken_for_gone():
    with answering(b"*2\r\n$%d\r\n" % SIZE + frame(1) + b"\r\n") as address:
        store = VaultStore(address)
        assert fetched(store, [1, 2], deadline=soon(0.5)) == {1: frame(1)}
        assert store.ready()
        assert (store.stats().missed_frames, store.stats().errors, store.stats().state) == (1, 1, "ok")


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\n",
        b"*1\r\n$99999999999\r\n",
        b"*1\r\n$-2\r\n",
        b"*1\r\n$4\r\nabcdef\r\n",
        b"*1\r\n:1\r\n",
        b"-LOADING busy\r\n",
        b"+OK\r\n",
        bytes(10_000),
        b"*1\r\n$x\r\n",
        b"*1\r\n$" + b"9" * 5000 + b"\r\n",  # Python makes no number of so many digits
    ],
    ids=beginning,
)
def test_an_answer_that_is_none_is_a_miss(answer):
    with answering(answer) as address:
        store = VaultStore(address)
        assert fetched(store, [1], whole, deadline=soon(2.0)) == {}
        assert (store.stats().missed_frames, store.stats().errors, store.ready()) == (1, 1, False)


@pytest.mark.parametrize(
    "answer", [b":--5", b":-", b":+5", b":" + b"9" * 21, b":" + b"9" * 5000, b"*" + b"1" * 5000, b"*-1"], ids=beginning
)
def test_a_number_that_is_none_is_a_miss_however_it_is_read(answer):
    with answering(answer + b"\r\n") as address:
        store = VaultStore(address)
        assert store.holds(ids([1]), soon(2.0)) == [False]
        assert (store.stats().errors, store.ready()) == (1, False)
    with pytest.raises(VaultGone):
        read_reply(answer + b"\r\n", 0)


def test_numbers_of_64_bits_are_read():
    for number in (0, 7, -7, 2**63 - 1, -(2**63)):
        with answering(b":%d\r\n" % number) as address:
            assert asked(address, [b"GET"]) == [number]
        assert read_reply(b":%d\r\n" % number, 0) == (number, len(f":{number}\r\n"))


def test_somebody_elses_frame_is_handed_on_only_as_what_it_is():
    """Whoever takes it compares key and fingerprint: here that there is something to compare."""
    with answering(b"*1\r\n$%d\r\n" % SIZE + frame(2) + b"\r\n") as address:
        store = VaultStore(address)
        assert fetched(store, [1], lambda number, data: bytes(data) == frame(number)) == {1: frame(2)}
        assert store.stats().damaged_frames == 1


def test_addresses_say_who_gets_in_and_never_show_it():
    found = parse("valkeys://me:p%40ss@vault.lan/3")
    assert (found.host, found.port, found.tls, found.user, found.password, found.database) == (
        "vault.lan", 6379, True, "me", "p@ss", 3,
    )  # fmt: skip
    assert found.shown == "valkeys://vault.lan:6379/3"
    assert "p@ss" not in repr(found)
    assert parse("redis://10.0.0.1:7000").port == 7000


@pytest.mark.parametrize("url", ["vault:6379", "http://vault", "valkey://", "valkey://h/x", "valkey://h?db=1", "valkey://h:x"])
def test_what_is_no_address_is_refused_with_an_example(url):
    with pytest.raises(AddressRefused):
        parse(url)


def test_a_password_comes_from_a_file_without_its_line_end(tmp_path):
    (tmp_path / "secret").write_text("s3cret\n")
    assert with_secrets(parse("valkey://h"), tmp_path / "secret", None).password == "s3cret"
    with pytest.raises(AddressRefused, match="cannot be used"):
        with_secrets(parse("valkey://h"), tmp_path / "absent", None)


def test_a_servers_configuration_bounds_it_and_hides_nothing_from_a_quote():
    config = VaultServer("127.0.0.1", 7000, 1 << 30, PASSWORD).config()
    assert "maxmemory 1073741824\nmaxmemory-policy allkeys-lfu" in config
    assert 'requirepass "pass \\"word\\\\"' in config
    with pytest.raises(ValueError, match="control characters"):
        VaultServer("127.0.0.1", 7000, 1, "a\nbind 0.0.0.0").config()


def test_nobody_answers_where_nobody_listens():
    with pytest.raises(VaultGone):
        Connection(parse("valkey://127.0.0.1:1"), None, soon(1))


def test_keys_in_the_vault_name_the_project():
    assert vault_store._key(b"\x01" * 32) == PREFIX + b"01" * 32
