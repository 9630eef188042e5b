import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.host_process.preload import server_module
from engine.replicas.devices import NotEnoughDevices, assign_devices, parse_gpu_list, parse_mask, resolve_replicas
from engine.replicas.launch import (
    SOCKET_PATH_BYTES_MAX,
    EngineSettings,
    LaunchRefused,
    ReplicaLaunch,
    devices_each,
    plan_launches,
)

CPU = EngineSettings("org/model", Path("/run/p"), Path("/dev/shm/p"), Path("/log/p"))
GPU = replace(CPU, devices=("0", "1", "2", "3"))


def plan(settings: EngineSettings, environ: dict[str, str] | None = None, cores: int = 8) -> tuple[ReplicaLaunch, ...]:
    return plan_launches(settings, environ or {}, cores)


def option(launch: ReplicaLaunch, flag: str) -> str:
    """The value that wins: the last."""
    return launch.argv[len(launch.argv) - 1 - launch.argv[::-1].index(flag) + 1]


def test_each_replica_has_its_own_name_socket_and_log() -> None:
    zero, one = plan(CPU)
    assert (zero.name, zero.socket, zero.log) == ("replica-0", "/run/p/replica-0.sock", "/log/p/replica-0.log")
    assert (one.name, one.socket, one.log) == ("replica-1", "/run/p/replica-1.sock", "/log/p/replica-1.log")
    assert option(one, "--uds") == one.socket


def test_a_replica_runs_the_stock_server_with_this_python() -> None:
    assert plan(CPU)[0].argv[:3] == (sys.executable, "-m", server_module())


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("launchers/api_server/entry.py", "vllm.entrypoints.launchers.api_server.entry"),
        ("openai/api_server.py", "vllm.entrypoints.openai.api_server"),
    ],
)
def test_the_servers_module_is_the_one_that_this_vllm_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, module: str
) -> None:
    server = tmp_path / "vllm" / "entrypoints" / file
    server.parent.mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('it shall be found without being imported')")
    server.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert server_module() == module


def test_a_replica_logs_no_stack_for_a_clients_error() -> None:
    for settings in (CPU, GPU):
        assert "--no-log-error-stack" in plan(settings)[0].argv


def test_on_the_cpu_alone_a_worker_of_our_own_is_run() -> None:
    module, _, name = option(plan(CPU)[0], "--worker-cls").rpartition(".")
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    assert f"class {name}(CPUWorker)" in Path(spec.origin).read_text()  # imported, it would take all of vLLM with it
    assert "--worker-cls" not in plan(GPU)[0].argv


def test_a_preloaded_host_gets_the_arguments_alone() -> None:
    assert plan(replace(CPU, preload=True))[0].argv[:2] == ("--model", "org/model")


def test_a_launcher_takes_the_place_of_the_server_and_is_never_preloaded() -> None:
    settings = replace(CPU, preload=True, launcher=("python", "fake.py"))
    assert not settings.preloads
    assert plan(settings)[0].argv[:4] == ("python", "fake.py", "--model", "org/model")


def test_the_connector_is_told_who_it_is() -> None:
    settings = replace(CPU, namespace="n", hash_name="sha256", pin_share_max=0.1, lossy="int8", tier_tenant_share_max=0.3)
    config = json.loads(option(plan(settings)[1], "--kv-transfer-config"))
    assert config["kv_connector_module_path"] == "engine.connector"
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {
        "table_dir": "/dev/shm/p",
        "replica": "replica-1",
        "hash": "sha256",
        "pin_share_max": 0.1,
        "tenant_share_max": 0.3,
        "lossy": "int8",
        "namespace": "n",
    }


def test_the_connector_can_be_left_out() -> None:
    assert "--kv-transfer-config" not in plan(replace(CPU, connector=False))[0].argv


def test_the_users_vllm_arguments_win() -> None:
    zero, _ = plan(replace(CPU, vllm_args=("--block-size", "64", "--no-enforce-eager")))
    assert option(zero, "--block-size") == "64"
    assert zero.argv.index("--no-enforce-eager") > zero.argv.index("--enforce-eager")


def test_all_names_of_the_model_are_told_to_vllm() -> None:
    args = plan(replace(CPU, served_model_name="m", model_aliases=("gpt-4o", "small")))[0].argv
    at = args.index("--served-model-name")
    assert args[at + 1 : at + 5] == ("m", "gpt-4o", "small", "--disable-uvicorn-access-log")


@pytest.mark.parametrize("args", [("--uds", "/x"), ("--port=1",), ("--api_key", "k"), ("-dp", "2"), ("--served_model_name=x",)])
def test_arguments_that_would_take_a_replica_out_of_our_hands_are_refused(args: tuple[str, ...]) -> None:
    with pytest.raises(LaunchRefused, match=args[0].partition("=")[0]):
        plan(replace(CPU, vllm_args=args))


def test_cpu_replicas_share_the_cores() -> None:
    assert [p.env["OMP_NUM_THREADS"] for p in plan(CPU, cores=8)] == ["4", "4"]
    assert plan(replace(CPU, replicas=3), cores=2)[0].env["OMP_NUM_THREADS"] == "1"


def test_the_users_environment_keeps_its_tunables_but_not_what_replicas_must_agree_on() -> None:
    env = plan(CPU, {"OMP_NUM_THREADS": "7", "PYTHONHASHSEED": "random", "LANG": "C"})[0].env
    assert (env["OMP_NUM_THREADS"], env["PYTHONHASHSEED"], env["LANG"]) == ("7", "0", "C")


def test_our_keys_do_not_reach_the_engines() -> None:
    env = plan(CPU, {"PEERKV_ADMIN_KEY": "secret", "VLLM_API_KEY": "secret"})[0].env
    assert "secret" not in env.values()


def test_a_model_on_disk_is_not_looked_up_on_the_network(tmp_path: Path) -> None:
    assert plan(replace(CPU, model=str(tmp_path)))[0].env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in plan(CPU)[0].env


def test_replicas_can_import_this_package() -> None:
    root = str(Path(__file__).resolve().parents[4])
    assert plan(CPU, {"PYTHONPATH": "/mine"})[0].env["PYTHONPATH"].split(":") == [root, "/mine"]


def test_each_gpu_replica_sees_its_own_gpu_only() -> None:
    launches = plan(replace(GPU, replicas=4))
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in launches] == ["0", "1", "2", "3"]
    assert [p.device for p in launches] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert "--enforce-eager" not in launches[0].argv


@pytest.mark.parametrize("args", [("--tensor-parallel-size", "2"), ("--tensor_parallel_size=2",), ("-tp", "2")])
def test_a_tensor_parallel_replica_gets_all_its_gpus(args: tuple[str, ...]) -> None:
    launches = plan(replace(GPU, vllm_args=args))
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in launches] == ["0,1", "2,3"]
    assert launches[1].device == "cuda:2,3"


def test_more_replicas_than_gpus_are_refused() -> None:
    with pytest.raises(NotEnoughDevices, match="need 5, and 4 are visible"):
        plan(replace(GPU, replicas=5))


@pytest.mark.parametrize("value", ["0", "-1", "two", ""])
def test_a_senseless_tensor_parallel_size_is_refused(value: str) -> None:
    with pytest.raises(LaunchRefused):
        devices_each(("-tp", value))


def test_auto_is_one_replica_for_each_share_of_the_gpus() -> None:
    assert resolve_replicas("auto", ("0", "1", "2"), 1) == 3
    assert resolve_replicas("auto", ("0", "1", "2"), 2) == 1
    assert resolve_replicas("auto", (), 1) == 2
    assert resolve_replicas(5, (), 1) == 5
    with pytest.raises(NotEnoughDevices):
        resolve_replicas("auto", ("0",), 2)


def test_replicas_that_share_gpus_are_spread_over_them_and_share_the_memory() -> None:
    assert resolve_replicas("auto", ("0", "1"), 1, 3) == 6
    shared = replace(GPU, devices=("0", "1"), replicas=3, replicas_per_gpu=2)
    assert [launch.env["CUDA_VISIBLE_DEVICES"] for launch in plan(shared)] == ["0", "1", "0"]
    assert {option(launch, "--gpu-memory-utilization") for launch in plan(shared)} == {"0.450"}
    assert option(plan(replace(shared, vllm_args=("--gpu-memory-utilization", "0.3")))[0], "--gpu-memory-utilization") == "0.3"
    assert "--gpu-memory-utilization" not in plan(replace(shared, replicas=2, replicas_per_gpu=1))[0].argv
    with pytest.raises(NotEnoughDevices, match="5 replicas, 2 on a GPU"):
        plan(replace(shared, replicas=5))
    with pytest.raises(NotEnoughDevices, match="cannot share"):
        plan(replace(shared, vllm_args=("-tp", "2")))


def test_masked_gpus_stay_masked() -> None:
    assert parse_mask("3, 1") == ("3", "1")
    assert parse_mask("GPU-aa,MIG-bb") == ("GPU-aa", "MIG-bb")
    assert parse_mask("0,-1,2") == ("0",)
    assert parse_mask("") == ()
    assert assign_devices(("3", "1"), 2, 1) == (("3",), ("1",))


def test_gpus_are_listed_by_index_and_mig_instances_by_uuid() -> None:
    listing = (
        "GPU 0: NVIDIA H200 (UUID: GPU-aaaa)\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-bbbb)\n"
        "  MIG 3g.71gb     Device  0: (UUID: MIG-cccc)\n"
        "  MIG 3g.71gb     Device  1: (UUID: MIG-dddd)\n"
        "GPU 2: NVIDIA H200 (UUID: GPU-eeee)\n"
    )
    assert parse_gpu_list(listing) == ("0", "MIG-cccc", "MIG-dddd", "2")
    assert parse_gpu_list("No devices found.\n") == ()


def test_a_socket_path_that_the_kernel_would_refuse_is_refused_with_the_way_out() -> None:
    longest = SOCKET_PATH_BYTES_MAX - len("/replica-0.sock")
    fake = replace(CPU, launcher=("fake",), replicas=1)
    assert plan(replace(fake, run_dir=Path("/" + "a" * (longest - 1))))
    with pytest.raises(LaunchRefused, match="choose a run_dir 1 bytes shorter"):
        plan(replace(fake, run_dir=Path("/" + "a" * longest)))


def test_the_sockets_inside_vllm_count_too() -> None:
    run_dir = Path("/" + "a" * 79)
    assert plan(replace(CPU, launcher=("fake",), run_dir=run_dir))
    with pytest.raises(LaunchRefused, match="ipc0"):
        plan(replace(CPU, run_dir=run_dir))


def test_host_memory_is_shared_out_among_the_replicas() -> None:
    assert replace(CPU, host_memory=1001, replicas=2).host_memory_bytes_each == 500
    assert replace(CPU, host_memory=1001, connector=False).host_memory_bytes_each == 0
    assert replace(CPU, host_memory=1001, replicas=2, devices=("0", "1")).host_memory_bytes_each == 500
