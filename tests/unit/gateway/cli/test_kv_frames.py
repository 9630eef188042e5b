"""`peerkv kv ls`, `rm`, `export` and `import` on a real disk and a real vault."""

import pytest

from engine.frame_tiers.disk.disk_store import DiskStore
from engine.frame_tiers.model_frames import ModelFrames
from engine.frame_tiers.secrecy import OPEN, read_secret
from engine.frame_tiers.store import frame_id
from engine.frame_tiers.vault.vault_store import VaultStore
from gateway.cli.main import main
from tests.unit.engine.frame_tiers.frames import FINGERPRINT, entries, fetched, frame, ids, soon
from tests.unit.engine.frame_tiers.node import FIELDS, HYBRID, SIZE, HostMemory, Node
from tests.unit.engine.frame_tiers.vault_servers import valkey

OTHER = b"o" * 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    home = tmp_path_factory.mktemp("vault")
    with valkey(home) as running:
        (home / "password").write_text(running.address.password)
        yield (
            running,
            ["--vault", f"valkey://127.0.0.1:{running.address.port}", "--vault-password-file", str(home / "password")],
        )


@pytest.fixture
def disk(tmp_path):
    """A directory with frames of two models, closed."""
    store = DiskStore(tmp_path / "disk", 1 << 20)
    store.put(entries(range(5)))
    others = [frame(number, fingerprint=OTHER) for number in range(3)]
    store.put([(frame_id(each), each) for each in others])
    store.close()
    return tmp_path / "disk"


def said(capsys, *command, status=0):
    assert main(["kv", *map(str, command)]) == status
    out, err = capsys.readouterr()
    return " ".join((out + err).split())


def test_a_disk_is_listed_by_model_also_while_it_is_in_use(capsys, disk):
    listed = said(capsys, "ls", "--disk", disk)
    assert f"{FINGERPRINT.hex()} 5" in listed
    assert f"{OTHER.hex()} 3" in listed
    store = DiskStore(disk, 1 << 20)
    assert said(capsys, "ls", "--disk", disk) == listed
    store.close()


def test_what_a_model_has_is_removed_and_the_rest_stays(capsys, disk):
    assert "removed 3 blocks" in said(capsys, "rm", OTHER.hex()[:8], "--disk", disk)
    assert OTHER.hex() not in said(capsys, "ls", "--disk", disk)
    store = DiskStore(disk, 1 << 20)
    assert len(fetched(store, range(5))) == 5
    assert "in use by another peerkv" in said(capsys, "rm", FINGERPRINT.hex(), "--disk", disk, status=1)
    store.close()


def test_a_file_carries_blocks_from_a_disk_to_a_vault_and_back(capsys, disk, server, tmp_path):
    running, vault = server
    assert "copied 5 blocks" in said(capsys, "export", tmp_path / "file", "--model", FINGERPRINT.hex(), "--disk", disk)
    assert "copied 5 blocks" in said(capsys, "import", tmp_path / "file", *vault)
    assert f"{FINGERPRINT.hex()} 5" in said(capsys, "ls", *vault)
    store = VaultStore(running.address)
    assert fetched(store, range(5)) == {number: frame(number) for number in range(5)}
    assert "copied 5 blocks" in said(capsys, "export", tmp_path / "back", *vault)
    assert "removed 5 blocks" in said(capsys, "rm", FINGERPRINT.hex(), *vault)
    assert not any(store.holds(ids(range(5)), soon()))
    store.close()
    assert "copied 5 blocks" in said(capsys, "import", tmp_path / "back", "--disk", tmp_path / "fresh")
    fresh = DiskStore(tmp_path / "fresh", 1 << 20)
    assert fetched(fresh, range(5)) == {number: frame(number) for number in range(5)}
    fresh.close()


def test_damaged_blocks_are_left_out_and_counted(capsys, disk, tmp_path):
    (segment,) = disk.glob("*.frames")
    data = bytearray(segment.read_bytes())
    data[200] ^= 1
    segment.write_bytes(data)
    text = said(capsys, "export", tmp_path / "file", "--disk", disk)
    assert "copied 7 blocks" in text
    assert "1 are damaged and left out" in text


@pytest.fixture
def memory(tmp_path):
    """The host memory of a replica with five blocks, and of a hybrid model with a window's and a state's."""
    tables = tmp_path / "tables"
    tables.mkdir()
    plain, hybrid = HostMemory(tables), HostMemory(tables, "replica-1", HYBRID, fields=FIELDS | {"weights": "w2"})
    plain.put(range(5))
    hybrid.put([0, 1])
    hybrid.put([1], group=1, slot=2)
    return tables, plain, hybrid


def test_host_memory_is_listed_by_model_and_what_it_has_is_copied_to_where_it_comes_up_from(capsys, memory, tmp_path):
    tables, plain, hybrid = memory
    listed = said(capsys, "ls", "--host-memory", tables)
    for replica, blocks in ((plain, 5), (hybrid, 3)):
        (rank,) = ModelFrames(replica.table_description, SIZE).ranks
        assert f"{rank.hex()} {blocks}" in listed
    assert "copied 8 blocks" in said(capsys, "export", tmp_path / "file", "--host-memory", tables)
    assert "copied 8 blocks" in said(capsys, "import", tmp_path / "file", "--disk", tmp_path / "disk")
    node = Node(tables, DiskStore(tmp_path / "disk", 1 << 20))
    node.models.note(node.demotion._tables.tables())
    assert node.up(plain, 5 * SIZE).tokens == 5 * SIZE
    assert node.staged(plain) == [0, 1, 2, 3, 4]
    assert node.up(hybrid, 2 * SIZE).tokens == 2 * SIZE
    node.close()
    (rank,) = ModelFrames(hybrid.table_description, SIZE).ranks
    assert "copied 3 blocks" in said(capsys, "export", tmp_path / "one", "--model", rank.hex(), "--host-memory", tables)


def test_of_host_memory_a_torn_block_is_left_out_and_a_secret_makes_what_is_copied_the_disks(capsys, memory, tmp_path):
    tables, plain, _ = memory
    plain.map[plain.offset(2) + 9] ^= 1
    (tmp_path / "secret").write_text("a secret of enough letters")
    told = said(capsys, "export", tmp_path / "file", "--host-memory", tables, "--tier-secret-file", tmp_path / "secret")
    assert "copied 7 blocks" in told
    said(capsys, "import", tmp_path / "file", "--disk", tmp_path / "disk")
    for secrecy, tokens in ((read_secret(tmp_path / "secret"), 2 * SIZE), (OPEN, 0)):
        node = Node(tables, DiskStore(tmp_path / "disk", 1 << 20), secrecy=secrecy)
        node.models.note(node.demotion._tables.tables())
        assert node.up(plain, 2 * SIZE).tokens == tokens
        node.close()


@pytest.mark.parametrize(
    ("command", "status", "words"),
    [
        (["rm", "0123456789", "--host-memory", "{home}"], 2, "kv flush"),
        (["import", "/dev/null", "--host-memory", "{home}"], 2, "only its replica changes host memory"),
        (["ls", "--host-memory", "{home}"], 1, "no replica has host memory"),
        (["ls", "--host-memory", "{home}", "--tier-secret-file", "/absent"], 2, "cannot be read"),
        (["ls", "--disk", "/absent"], 1, "is no directory"),
        (["ls", "--vault", "valkey://127.0.0.1:1"], 1, "no connection"),
        (["ls", "--vault", "vault"], 2, "not like valkey://"),
        (["rm", "xyz", "--disk", "/tmp"], 2, "kv ls"),
        (["import", "/dev/null", "--disk", "{home}"], 1, "is no file of KV blocks"),
        (["import", "/absent", "--disk", "{home}"], 1, "No such file"),
        (["export", "/dev/null", "--disk", "{home}"], 1, "exists"),
    ],
)
def test_what_cannot_be_done_is_said(capsys, tmp_path, command, status, words):
    assert words in said(capsys, *[part.replace("{home}", str(tmp_path)) for part in command], status=status)
