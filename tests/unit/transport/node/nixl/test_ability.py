"""Whether a node can use NIXL, and how UCX is told where."""

from pathlib import Path

import pytest

from transport.node.nixl import ability as module
from transport.node.nixl.ability import Ability, ability, agreed_with, environment, interface_of


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VARIANTS", {"msgspec": "msgspec"})  # a package that is there


@pytest.fixture
def devices(tmp_path: Path) -> Path:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text("4: ACTIVE\n")
    return tmp_path


def test_tcp_alone_means_no_nixl(installed: None, devices: Path) -> None:
    assert ability("tcp", devices) == Ability(reason="node_transport is tcp")


def test_without_the_package_there_is_none(monkeypatch: pytest.MonkeyPatch, devices: Path) -> None:
    monkeypatch.setattr(module, "VARIANTS", {"nixl-none": "nixl_none"})
    assert ability("nixl", devices) == Ability(reason="NIXL is not installed")


def test_by_itself_it_is_used_by_rdma_alone(installed: None, devices: Path, tmp_path: Path) -> None:
    found = ability("auto", devices)
    assert found.version
    assert (found.devices, found.only_rdma) == (True, True)
    (devices / "mlx5_0" / "ports" / "1" / "state").write_text("1: DOWN\n")
    assert ability("auto", devices) == Ability(reason="no RDMA device is active")
    assert ability("auto", tmp_path / "none").reason == "no RDMA device is active"


def test_whoever_wants_it_has_it_without_rdma_too(installed: None, tmp_path: Path, devices: Path) -> None:
    assert ability("nixl", devices).devices
    found = ability("nixl", tmp_path / "none")
    assert found.version
    assert (found.devices, found.only_rdma) == (False, False)


def test_two_nodes_need_the_same_version() -> None:
    ours = Ability("1.5.1", "", "nixl_cu13")
    assert agreed_with(ours, "1.5.1") == ours
    assert not agreed_with(ours, "1.5.2").version
    assert not agreed_with(ours, "").version
    assert agreed_with(Ability(reason="none"), "1.5.1") == Ability(reason="none")


def test_by_itself_ucx_is_told_to_use_no_tcp_whatever_it_was_told() -> None:
    made = environment(Ability("1", "", "p", devices=True, only_rdma=True), "127.0.0.1", {"UCX_TLS": "all", "HOME": "/h"})
    assert (made["UCX_TLS"], made["HOME"], made["UCX_TCP_KEEPIDLE"]) == ("^tcp", "/h", "1s")
    assert "UCX_NET_DEVICES" not in made


def test_without_rdma_it_listens_on_the_interface_of_the_nodes_address_alone() -> None:
    without = Ability("1", "", "p")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.7") == ""
    assert environment(without, "127.0.0.1", {})["UCX_NET_DEVICES"] == "lo"
    assert "UCX_NET_DEVICES" not in environment(without, "192.0.2.7", {})
    given = {"UCX_NET_DEVICES": "eth9", "UCX_TCP_KEEPIDLE": "9s"}
    assert environment(without, "127.0.0.1", given).items() >= given.items()
    assert "UCX_NET_DEVICES" not in environment(Ability("1", "", "p", devices=True), "127.0.0.1", {})
