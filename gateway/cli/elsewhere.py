"""Which peerkv runs on this machine, of this user, though not where a command looked: by the processes that own replicas."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.tenants.loopback import port_here

PROC = Path("/proc")
HOST_PROCESS = "engine.host_process"
_LISTENS = "0A"


@dataclass(frozen=True, slots=True)
class Server:
    """A `peerkv serve`, with the ports that it listens on, or a `peerkv engine`, which has none."""

    run_dir: Path
    ports: tuple[int, ...]


def the_only_server(proc: Path = PROC) -> Server | None:
    """Return the peerkv that runs here; None if there is none, or more than one."""
    found: dict[Path, set[int]] = {}
    for server in _servers(proc):  # the replicas that it forked look like it
        found.setdefault(server.run_dir, set()).update(server.ports)
    if len(found) != 1:
        return None
    [(run_dir, ports)] = found.items()
    return Server(run_dir, tuple(sorted(ports)))


def flags_for(server: Server, port: int) -> str:
    """Return how to point a command at `server`, which is looked for on `port` by itself."""
    ports = [f"--port {each}" for each in server.ports[:1] if each != port]
    return " ".join([*ports, f"--run-dir {server.run_dir}"])


def port_elsewhere(url: str, proc: Path = PROC) -> str:
    """Return what to add to the news that nobody answers at `url`, "" if that is elsewhere or no other port is known."""
    port = port_here(url)
    server = the_only_server(proc) if port is not None else None
    if server is None or not server.ports or port in server.ports:
        return ""
    return f"; one listens on port {server.ports[0]} of this machine (--port {server.ports[0]})"


def run_dir_of(url: str, proc: Path = PROC) -> str:
    """Return how to tell a command the run_dir of the server at `url`, "" if that is not the only one here."""
    server = the_only_server(proc)
    return f"PEERKV_RUN_DIR={server.run_dir}" if server is not None and port_here(url) in server.ports else ""


def _servers(proc: Path) -> Iterator[Server]:
    for process in proc.glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue
            words = process.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
            if HOST_PROCESS in words and "--run-dir" in words:
                yield Server(Path(words[words.index("--run-dir") + 1]), _ports(proc, _parent(process)))
        except (OSError, ValueError, IndexError):  # it has just ended
            continue


def _parent(process: Path) -> str:
    lines = process.joinpath("status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("PPid:"))


def _ports(proc: Path, pid: str) -> tuple[int, ...]:
    """Return the TCP ports that a process listens on."""
    sockets = set()
    for descriptor in proc.joinpath(pid, "fd").iterdir():
        try:
            sockets.add(os.readlink(descriptor))
        except OSError:  # closed meanwhile
            continue
    return tuple(sorted({port for table in ("tcp", "tcp6") for port in _listening(proc / pid / "net" / table, sockets)}))


def _listening(table: Path, sockets: set[str]) -> Iterator[int]:
    rows: Sequence[list[str]] = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    for row in rows:  # as proc_pid_net(5) has it: number, local address, remote address, state, …, inode
        if len(row) > 9 and row[3] == _LISTENS and f"socket:[{row[9]}]" in sockets:
            yield int(row[1].rpartition(":")[2], 16)
