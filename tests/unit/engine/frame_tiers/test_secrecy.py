"""With a secret, frames are encrypted, and those of who does not have it are nobody's."""

import hashlib

import numpy as np
import pytest

from engine.frame_tiers.secrecy import OPEN, Secrecy, SecretRefused, read_secret
from tests.unit.engine.frame_tiers.node import SIZE, HostMemory, Node, content
from tests.unit.engine.frame_tiers.test_down_and_up import Memory
from transport.fingerprint import fingerprint_digest
from transport.frames.errors import FrameLocked
from transport.frames.frame import read_header, read_into
from transport.table.quality import marked, tenant_mark


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


def test_each_tenant_has_a_key_of_its_own_that_opens_no_other_tenants_frames(tmp_path, secret):
    secrecy, vault = read_secret(secret("a secret of enough letters")), Memory("vault")
    memory, node = HostMemory(tmp_path), Node(tmp_path, vault, secrecy=secrecy)
    marks = [tenant_mark("one"), tenant_mark("two"), 0]
    for place, mark in enumerate(marks):
        memory.put([place], slot=place, quality=marked(mark))
    node.down()
    model = node.models.find(fingerprint_digest(memory.fields))
    for place, own in enumerate(marks):
        key = memory.chain[place].tobytes()
        frame = vault.kept[model.ids(key)[0]]
        assert read_header(frame).tenant == own
        out, about = np.empty(model.sizes[0], np.uint8), {"fingerprint": model.ranks[0], "key": key, "shape": model.shapes[0]}
        for mark in marks:
            if mark == own:
                read_into(out, frame, secret=secrecy.key_of(mark), **about)
                assert out.tobytes() == content(key, 0, 128).tobytes()
            else:
                with pytest.raises(FrameLocked):
                    read_into(out, frame, secret=secrecy.key_of(mark), **about)
    assert node.up(memory, 3 * SIZE).tokens == 3 * SIZE
    assert node.staged(memory, "vault") == [0, 1, 2]
    node.close()


def test_frames_of_the_time_when_a_secret_made_one_key_for_all_tenants_are_not_found_and_nothing_fails(tmp_path, secret):
    def derived(what):
        return hashlib.blake2b(b"a secret of enough letters", digest_size=32, person=b"peerkv-" + what).digest()

    class OneKey(Secrecy):
        def key_of(self, tenant):
            return self.key

    memory, vault = HostMemory(tmp_path), Memory("vault")
    former = Node(tmp_path, vault, secrecy=OneKey(derived(b"key"), derived(b"mark")[:8]))
    memory.put(range(4))
    former.down()
    former.close()
    assert len(vault.kept) == 4
    node = Node(tmp_path, vault, secrecy=read_secret(secret("a secret of enough letters")))
    node.models.note(node.demotion._tables.tables())
    assert node.up(memory).source == ""
    assert len(vault.kept) == 4  # none was asked for: nothing was found damaged
    node.down()
    assert node.up(memory).tokens == 4 * SIZE
    node.close()


def test_what_is_no_secret_is_refused_without_being_told(secret, tmp_path):
    with pytest.raises(SecretRefused, match="openssl rand") as told:
        read_secret(secret("short"))
    assert "short" not in str(told.value)
    with pytest.raises(SecretRefused, match="cannot be read"):
        read_secret(tmp_path / "absent")
    assert "letters" not in repr(read_secret(secret("a secret of enough letters")))
    assert read_secret(secret("a secret of enough letters")) == read_secret(secret("\na secret of enough letters\n"))
