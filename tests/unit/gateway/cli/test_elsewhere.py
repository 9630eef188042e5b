"""A command that finds nothing where it looked says where a peerkv runs: a directory stands in for /proc."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from gateway.cli import elsewhere
from gateway.cli.doctor import report as doctor
from gateway.cli.elsewhere import Server, flags_for, port_elsewhere, run_dir_of, the_only_server
from gateway.settings import load

TABLE = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def serves(proc: Path, number: int, run_dir: str, *ports: int) -> None:
    """A host process with this number, and its parent, which listens on `ports` and is connected on another one."""
    host, parent = proc / str(number), proc / str(number + 1)
    for each in (host, parent / "fd", parent / "net"):
        each.mkdir(parents=True)
    words = ["python", "-m", "engine.host_process", "--hold", "5", "--run-dir", run_dir, "--table-dir", "/dev/shm/t"]
    (host / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (host / "status").write_text(f"Name:\tpython\nPPid:\t{number + 1}\n")
    (parent / "cmdline").write_bytes(b"python\0-m\0gateway.cli\0serve\0")
    rows = [f"{place}: 0100007F:{port:04X} 00000000:0000 0A 0:0 0:0 0 0 0 {port}" for place, port in enumerate(ports)]
    rows.append("9: 0100007F:0BB8 0100007F:1F90 01 0:0 0:0 0 0 0 3000")
    rows.append("9: 0100007F:0016 00000000:0000 0A 0:0 0:0 0 0 0 22")
    (parent / "net" / "tcp").write_text(TABLE + "\n".join(rows) + "\n")
    for place, inode in enumerate((*ports, 3000)):
        (parent / "fd" / str(place)).symlink_to(f"socket:[{inode}]")


def test_a_server_is_found_by_its_host_process_and_the_port_by_its_parent(tmp_path: Path) -> None:
    serves(tmp_path, 100, "/run/elsewhere", 9000)
    found = the_only_server(tmp_path)
    assert found == Server(Path("/run/elsewhere"), (9000,))
    assert flags_for(found, 8000) == "--port 9000 --run-dir /run/elsewhere"
    assert flags_for(found, 9000) == "--run-dir /run/elsewhere"


def test_replicas_that_look_like_their_host_process_are_no_second_server(tmp_path: Path) -> None:
    serves(tmp_path, 100, "/run/elsewhere", 9000)
    serves(tmp_path, 200, "/run/elsewhere")
    assert the_only_server(tmp_path) == Server(Path("/run/elsewhere"), (9000,))


def test_of_several_servers_none_is_meant(tmp_path: Path) -> None:
    assert the_only_server(tmp_path) is None
    serves(tmp_path, 100, "/run/one", 9000)
    serves(tmp_path, 200, "/run/other", 9001)
    assert the_only_server(tmp_path) is None
    assert port_elsewhere("http://127.0.0.1:8000", tmp_path) == ""


def test_who_finds_no_gateway_is_told_the_port_of_the_only_one_here(tmp_path: Path) -> None:
    serves(tmp_path, 100, "/run/elsewhere", 9000)
    assert port_elsewhere("http://127.0.0.1:8000", tmp_path).endswith("listens on port 9000 of this machine (--port 9000)")
    assert port_elsewhere("http://127.0.0.1:9000", tmp_path) == port_elsewhere("http://far.example:8000", tmp_path) == ""
    assert run_dir_of("http://127.0.0.1:9000", tmp_path) == "PEERKV_RUN_DIR=/run/elsewhere"
    assert run_dir_of("http://127.0.0.1:8000", tmp_path) == ""


def test_an_engine_alone_has_no_port(tmp_path: Path) -> None:
    serves(tmp_path, 100, "/run/elsewhere")
    found = the_only_server(tmp_path)
    assert found == Server(Path("/run/elsewhere"), ())
    assert flags_for(found, 8000) == "--run-dir /run/elsewhere"
    assert port_elsewhere("http://127.0.0.1:8000", tmp_path) == ""


def test_ports_are_read_as_the_kernel_tells_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert listener.getsockname()[1] in elsewhere._ports(elsewhere.PROC, str(os.getpid()))


def test_the_doctor_says_how_to_examine_what_runs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "the_only_server", lambda: Server(Path("/run/elsewhere"), (9000,)))
    directories = {name: tmp_path / name for name in ("run_dir", "table_dir", "log_dir")}
    doctor.run(load({"port": 8000, **directories}), measure_links=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "a peerkv runs on this machine with another run_dir, /run/elsewhere" in said
    assert "peerkv doctor --port 9000 --run-dir /run/elsewhere" in said
