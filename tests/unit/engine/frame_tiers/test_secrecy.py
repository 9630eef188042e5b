"""With a secret, frames are encrypted, and those of who does not have it are nobody's."""

import pytest

from engine.frame_tiers.secrecy import OPEN, SecretRefused, read_secret
from tests.unit.engine.frame_tiers.node import SIZE, HostMemory, Node, content
from tests.unit.engine.frame_tiers.test_down_and_up import Memory
from transport.fingerprint import fingerprint_digest


@pytest.fixture
def secret(tmp_path):
    def written(text):
        path = tmp_path / "secret"
        path.write_text(text)
        return path

    return written


def test_what_is_kept_is_encrypted_and_comes_back(tmp_path, secret):
    secrecy, vault = read_secret(secret("a secret of enough letters\n")), Memory("vault")
    memory, node = HostMemory(tmp_path), Node(tmp_path, vault, codec="raw", secrecy=secrecy)
    memory.put(range(4))
    node.down()
    plain = content(memory.chain[0].tobytes(), 0, 128).tobytes()
    assert len(vault.kept) == 4
    assert not any(plain[:16] in frame for frame in vault.kept.values())
    assert node.up(memory).tokens == 4 * SIZE
    assert node.staged(memory, "vault") == [0, 1, 2, 3]
    node.close()


def test_another_secret_or_none_finds_nothing_and_removes_nothing(tmp_path, secret):
    secrecy, vault = read_secret(secret("a secret of enough letters")), Memory("vault")
    memory, node = HostMemory(tmp_path), Node(tmp_path, vault, secrecy=secrecy)
    memory.put(range(4))
    node.down()
    node.close()
    for other in (OPEN, read_secret(secret("another secret of as many"))):
        stranger = Node(tmp_path, vault, secrecy=other)
        stranger.models.note(stranger.demotion._tables.tables())
        assert stranger.up(memory).source == ""
        assert len(vault.kept) == 4
        stranger.close()


def test_a_frame_that_was_forged_without_the_secret_does_not_come_up(tmp_path, secret):
    secrecy, vault = read_secret(secret("a secret of enough letters")), Memory("vault")
    memory, plain = HostMemory(tmp_path), Memory("vault")
    open_node = Node(tmp_path, plain)
    memory.put(range(2))
    open_node.down()
    open_model = open_node.models.find(fingerprint_digest(memory.fields))
    node = Node(tmp_path, vault, secrecy=secrecy)
    node.models.note(node.demotion._tables.tables())
    model = node.models.find(fingerprint_digest(memory.fields))
    for key in memory.chain[:2]:
        vault.kept[model.ids(key)[0]] = plain.kept[open_model.ids(key)[0]]
    assert node.up(memory).source == ""
    open_node.close()
    node.close()


def test_what_is_no_secret_is_refused_without_being_told(secret, tmp_path):
    with pytest.raises(SecretRefused, match="openssl rand") as told:
        read_secret(secret("short"))
    assert "short" not in str(told.value)
    with pytest.raises(SecretRefused, match="cannot be read"):
        read_secret(tmp_path / "absent")
    assert "letters" not in repr(read_secret(secret("a secret of enough letters")))
    assert read_secret(secret("a secret of enough letters")) == read_secret(secret("\na secret of enough letters\n"))
