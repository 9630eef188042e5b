"""Keys between nodes: who may be called from where, and what is refused before anything listens."""

import os
import ssl
from pathlib import Path

import pytest

from engine.node.agent import Agent
from engine.node.settings import NodeSettings
from gateway.cli.main import main
from gateway.errors import SettingsError
from gateway.serve.other_nodes import check_nodes
from gateway.settings import load
from transport.node.keys import CA, CA_KEY, NODE, check_address, client_context, make_keys, server_context
from transport.node.messages import NodeError


def test_without_keys_a_node_listens_on_loopback_alone(tmp_path: Path) -> None:
    check_address("127.0.0.1", None)
    check_address("::1", None)
    check_address("10.0.0.1", tmp_path)
    with pytest.raises(NodeError, match="loopback alone"):
        check_address("10.0.0.1", None)
    with pytest.raises(NodeError, match="loopback alone"):
        Agent(NodeSettings("node-a", "10.0.0.1", 7710, str(tmp_path), str(tmp_path)))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "node-a.lan", ""])
def test_a_node_listens_on_one_address_that_is_named(tmp_path: Path, host: str) -> None:
    with pytest.raises(NodeError):
        check_address(host, tmp_path)


def test_keys_are_for_their_owners_eyes_and_name_their_nodes(tmp_path: Path) -> None:
    made = make_keys(tmp_path / "keys", ["node-a", "node-b"])
    assert [each.name for each in made] == ["node-a", "node-b"]
    for secret in (tmp_path / "keys" / CA_KEY, made[0] / NODE, made[1] / NODE):
        assert secret.stat().st_mode & 0o077 == 0
    assert (made[0] / CA).read_bytes() == (tmp_path / "keys" / CA).read_bytes()
    for make in (server_context, client_context):
        context = make(made[0])
        assert context is not None
        assert (context.verify_mode, context.minimum_version) == (ssl.CERT_REQUIRED, ssl.TLSVersion.TLSv1_3)
    make_keys(tmp_path / "keys", ["node-c"])  # of the same authority
    with pytest.raises(NodeError, match="has keys already"):
        make_keys(tmp_path / "keys", ["node-d", "node-a"])
    assert not (tmp_path / "keys" / "node-d").exists()


def test_a_private_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (made,) = make_keys(tmp_path, ["node-a"])
    os.chmod(made / NODE, 0o644)
    with pytest.raises(NodeError, match="chmod 600"):
        server_context(made)
    with pytest.raises(NodeError, match="node-keys"):
        server_context(tmp_path / "nothing")


def test_a_private_key_is_taken_as_systemd_hands_it_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, other = make_keys(tmp_path / "keys", ["node-a", "node-b"])
    for made in (given, other):
        os.chmod(made / NODE, 0o440)  # what a credential's ACL for the service's user looks like
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(given))
    assert server_context(given) is not None
    assert client_context(given) is not None
    with pytest.raises(NodeError, match="chmod 600"):
        server_context(other)
    for mode in (0o444, 0o460):
        os.chmod(given / NODE, mode)
        with pytest.raises(NodeError, match="chmod 600"):
            server_context(given)
    os.chmod(given / NODE, 0o440)
    (tmp_path / "link").symlink_to(tmp_path / "keys")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "link" / "node-a"))
    assert server_context(given) is not None
    for elsewhere in ("", "keys/node-a"):
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", elsewhere)
        with pytest.raises(NodeError, match="chmod 600"):
            server_context(given)


def test_the_command_makes_keys_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["node-keys", str(tmp_path / "keys"), "node-a", "node-b"]) == 0
    assert f"node-b: --node-keys {tmp_path / 'keys' / 'node-b'}" in capsys.readouterr().out
    assert main(["node-keys", str(tmp_path / "keys"), "node-a"]) == 1
    assert main(["node-keys", str(tmp_path / "keys"), "Node A"]) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"node_address": "10.0.0.1:7710"}, "needs a name"),
        ({"node_name": "node-a"}, "node_address"),
        ({"node_name": "node-a", "node_address": "127.0.0.1:7710"}, "no other node is named"),
        ({"node_name": "node-a", "node_address": "10.0.0.1:7710", "node_peers": "node-b=10.0.0.2:7710"}, "loopback alone"),
    ],
)
def test_what_is_not_enough_is_told_before_the_start(settings: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        check_nodes(load(flags=settings))


def test_a_node_alone_and_one_among_others_may_start(tmp_path: Path) -> None:
    check_nodes(load())
    (made,) = make_keys(tmp_path, ["node-a"])
    among = {"node_name": "node-a", "node_address": "10.0.0.1:7710", "node_keys": str(made), "join": "valkeys://u:p@h:1"}
    check_nodes(load(flags=among))
    for left_out in ("node_name", "node_address", "node_keys", "join"):  # each of them is needed
        with pytest.raises(SettingsError):
            check_nodes(load(flags=among | {left_out: ""}))
