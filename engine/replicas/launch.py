"""How a replica is started: its settings, its command line, its environment."""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.fleet import FleetError
from engine.frame_tiers.secrecy import SecretRefused, read_secret
from engine.frame_tiers.vault.address import AddressRefused, parse, with_secrets
from engine.host_process.preload import server_module
from engine.replicas.devices import assign_devices
from engine.replicas.lifecycle import RestartPolicy
from engine.replicas.vllm_options import option_name, refusals

SOCKET_PATH_BYTES_MAX = 107  # sun_path of Linux, less its final zero
ENGINE_SOCKET_BYTES = 37  # vLLM names the sockets between its own processes "/<uuid>"
CPU_BLOCK_TOKENS = 32  # the CPU attention kernel works in multiples of it
CPU_KV_BYTES = 512 << 20
CPU_SEQUENCES_MAX = 16
GPU_MEMORY_SHARE = 0.9
"""Share of a GPU's memory that its replicas take together; the rest is for each one's CUDA context."""
WAY_DOWN_BYTES, WAY_DOWN_BYTES_OF_GPU = 128 << 20, 1 << 30
"""Host memory of a replica that has a disk or a vault below it, where none is asked for: on a GPU blocks come faster, and one
of a large model has 2 MiB."""
STAGING_BYTES, STAGING_BYTES_OF_GPUS = 256 << 20, 4 << 30
"""Memory into which disk and vault bring blocks: on GPUs a prompt of 32,768 tokens of an 8B model has 4 GiB."""
CPU_WORKER = "engine.connector.cpu_worker.CpuWorker"


class LaunchRefused(FleetError):
    """A replica cannot be started with these settings; the message says which, and why."""


@dataclass(frozen=True, slots=True)
class EngineSettings(RestartPolicy):
    """All that the supervisor needs to run replicas. Directories are absolute; times are seconds.

    The defaults, those of RestartPolicy too, are stated here alone: gateway/settings.py takes them over.
    """

    model: str  # a directory, or a hub id
    run_dir: Path
    table_dir: Path
    log_dir: Path
    name: str = ""  # where there are several fleets, what its replicas' names begin with
    served_model_name: str = ""  # empty: the same as `model`
    model_aliases: tuple[str, ...] = ()  # further names of the model
    replicas: int = 2
    replicas_per_gpu: int = 1
    replicas_beside: int = 0  # of other fleets of this machine
    devices: tuple[str, ...] = ()  # GPU ids as CUDA_VISIBLE_DEVICES takes them; empty: CPU
    vllm_args: tuple[str, ...] = ()  # the user's own; they override ours
    namespace: str = ""  # replicas in different namespaces exchange nothing
    hash_name: str = "xxh3_128"
    pin_share_max: float = 0.25  # of a replica's KV cache, for pinned prefixes
    host_memory: int = 0  # bytes of all replicas together, for blocks that left their KV caches; 0: none
    host_memory_dir: Path | None = None  # where it is kept in named files, which outlive everything; None: without a name
    host_memory_ttl_seconds: float = 0.0  # 0: without end
    disk: Path | None = None  # a directory that keeps what host memory does not; None: none
    disk_bytes: int = 10 << 30
    disk_ttl_seconds: float = 0.0  # 0: without end
    vault: str = field(default="", repr=False)  # the URL of a Valkey server, maybe with a password; empty: none
    vault_password_file: Path | None = None
    vault_ca_file: Path | None = None
    vault_ttl_seconds: float = 0.0  # 0: until the server needs the room
    tier_codec: str = "raw-z"
    lossy: str = ""  # a codec with loss for callers who accept that; empty: none
    tier_secret_file: Path | None = None  # with it, what disk and vault keep is encrypted
    tier_tenant_share_max: float = 0.5  # of host memory and of the disk, while others want room
    tier_staging_bytes: int = 0  # for what comes up from the disk, and as much for the vault; 0: what staging_bytes says
    connector: bool = True  # False: plain vLLM without our connector
    preload: bool = False  # import vllm once, fork the replicas (CPU)
    launcher: tuple[str, ...] | None = None  # run this in place of vLLM's server
    health_interval_seconds: float = 2.0
    health_timeout_seconds: float = 10.0
    claim_seconds_max: float = 15.0  # wait for a previous peerkv to release the directories
    log_bytes_max: int = 16 << 20  # a larger log is rotated, even while its replica runs

    @property
    def preloads(self) -> bool:
        """Whether replicas are forked from a host that imported vLLM."""
        return self.preload and self.launcher is None

    @property
    def host_memory_bytes_each(self) -> int:
        """The host memory of one replica; 0 where nothing could be stored. To disk and vault it is the way."""
        if not self.connector:
            return 0
        way_down = WAY_DOWN_BYTES_OF_GPU if self.devices else WAY_DOWN_BYTES
        return self.host_memory // self.replicas or (way_down if self.frame_tiers else 0)

    @property
    def staging_bytes(self) -> int:
        """Memory for what comes up from the disk, and as much for the vault."""
        return self.tier_staging_bytes or (STAGING_BYTES_OF_GPUS if self.devices else STAGING_BYTES)

    def replica_name(self, index: int) -> str:
        """The name of a replica, from 0."""
        return f"{self.name or 'replica'}-{index}"

    @property
    def frame_tiers(self) -> bool:
        """Whether there is a disk or a vault."""
        return self.connector and (self.disk is not None or self.vault != "")


@dataclass(frozen=True, slots=True)
class ReplicaLaunch:
    """One replica's start. `argv` lacks the program where a preloaded host runs the server itself."""

    name: str
    argv: tuple[str, ...]
    env: dict[str, str]
    device: str
    socket: str
    scratch: str
    log: str


def plan_launches(settings: EngineSettings, environ: Mapping[str, str], cores: int) -> tuple[ReplicaLaunch, ...]:
    """The start of every replica. Raises LaunchRefused, NotEnoughDevices."""
    check_user_args(settings.vllm_args)
    _check_tiers(settings)
    devices = assign_devices(settings.devices, settings.replicas, devices_each(settings.vllm_args), settings.replicas_per_gpu)
    shared = replica_env(settings, environ, cores)
    return tuple(_plan_launch(settings, i, own, shared) for i, own in enumerate(devices))


def replica_env(settings: EngineSettings, environ: Mapping[str, str], cores: int) -> dict[str, str]:
    """The environment that all replicas share; a preloading host needs it before it imports vLLM.

    Our own settings (they may hold keys) are left out. Where the user's environment sets one of the tunables,
    the user's value stays.
    """
    env = {k: v for k, v in environ.items() if not k.startswith("PEERKV_") and k != "VLLM_API_KEY"}
    tunables = {
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",  # the engine forks
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}",  # survives a restart
    }
    if not settings.devices:
        tunables |= {
            "OMP_NUM_THREADS": str(max(1, cores // (settings.replicas + settings.replicas_beside))),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # engine and worker in one process
            "TORCHDYNAMO_DISABLE": "1",  # otherwise the first request for logprobs compiles for many seconds
        }
    elif "CUDA_VISIBLE_DEVICES" not in environ:
        tunables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # as nvidia-smi counts
    if Path(settings.model).is_dir():
        tunables["HF_HUB_OFFLINE"] = "1"
    fixed = {
        "PYTHONHASHSEED": "0",  # replicas must agree on vLLM's own hashes
        "PYTHONPATH": _python_path(environ),
        "VLLM_SERVER_DEV_MODE": "1",  # for /reset_prefix_cache; the socket is private to this user
    }
    return tunables | env | fixed


def check_user_args(args: Sequence[str]) -> None:
    """Raise LaunchRefused for a vLLM option that would take a replica out of our control, or have no effect on one."""
    for refusal in refusals(args):
        raise LaunchRefused(refusal)


def devices_each(args: Sequence[str]) -> int:
    """How many GPUs a replica needs under these vLLM options. Raises LaunchRefused."""
    tensor = _int_option(args, ("--tensor-parallel-size", "-tp"))
    pipeline = _int_option(args, ("--pipeline-parallel-size", "-pp"))
    return tensor * pipeline


def server_args(settings: EngineSettings, name: str, socket: str) -> tuple[str, ...]:
    """Return the arguments of one vLLM server; the user's come last and therefore win."""
    args = ["--model", settings.model, "--uds", socket]
    args += ["--served-model-name", settings.served_model_name or settings.model, *settings.model_aliases]
    args += ["--disable-uvicorn-access-log", "--enable-prompt-tokens-details"]
    args += ["--no-log-error-stack"]  # dev mode turns it on: some 30 lines in the log for each 4xx
    if not settings.devices:
        args += ["--block-size", str(CPU_BLOCK_TOKENS), "--kv-cache-memory-bytes", str(CPU_KV_BYTES)]
        args += ["--max-num-seqs", str(CPU_SEQUENCES_MAX), "--max-model-len", "auto", "--enforce-eager"]
        args += ["--worker-cls", CPU_WORKER]
    elif settings.replicas_per_gpu > 1:
        args += ["--gpu-memory-utilization", f"{GPU_MEMORY_SHARE / settings.replicas_per_gpu:.3f}"]
    if settings.connector:
        args += ["--kv-transfer-config", json.dumps(_transfer_config(settings, name), separators=(",", ":"))]
    return (*args, *settings.vllm_args)


def _plan_launch(settings: EngineSettings, index: int, devices: tuple[str, ...], shared: Mapping[str, str]) -> ReplicaLaunch:
    name = settings.replica_name(index)
    socket = str(settings.run_dir / f"{name}.sock")
    scratch = str(settings.run_dir / f"ipc{index}")
    _check_socket_path(socket, len(os.fsencode(socket)))
    env = dict(shared)
    if settings.launcher is None:
        _check_socket_path(scratch, len(os.fsencode(scratch)) + ENGINE_SOCKET_BYTES)
        env |= {"VLLM_RPC_BASE_PATH": scratch, "TMPDIR": scratch}  # a killed vLLM leaves files there
    if devices:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    args = server_args(settings, name, socket)
    if not settings.preloads:
        args = (*(settings.launcher or (sys.executable, "-m", server_module())), *args)
    device = f"cuda:{','.join(devices)}" if devices else "cpu"
    return ReplicaLaunch(name, args, env, device, socket, scratch, str(settings.log_dir / f"{name}.log"))


def _transfer_config(settings: EngineSettings, name: str) -> dict[str, object]:
    extra: dict[str, object] = {"table_dir": str(settings.table_dir), "replica": name, "hash": settings.hash_name}
    extra["pin_share_max"] = settings.pin_share_max
    extra["tenant_share_max"] = settings.tier_tenant_share_max
    if settings.host_memory_ttl_seconds:
        extra["host_memory_ttl_seconds"] = settings.host_memory_ttl_seconds
    if settings.lossy:
        extra["lossy"] = settings.lossy
    if settings.namespace:
        extra["namespace"] = settings.namespace
    return {
        "kv_connector": "PeerKVConnector",
        "kv_connector_module_path": "engine.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def _check_tiers(settings: EngineSettings) -> None:
    """Raise LaunchRefused for a vault whose address or files cannot be, and for a secret that is none."""
    try:
        if settings.vault:
            with_secrets(parse(settings.vault), settings.vault_password_file, settings.vault_ca_file)
        if settings.tier_secret_file is not None:
            read_secret(settings.tier_secret_file)
    except (AddressRefused, SecretRefused) as refused:
        raise LaunchRefused(str(refused)) from None


def _check_socket_path(path: str, length: int) -> None:
    if length > SOCKET_PATH_BYTES_MAX:
        over = length - SOCKET_PATH_BYTES_MAX
        raise LaunchRefused(f"sockets under {path} would have too long a path: choose a run_dir {over} bytes shorter")


def _python_path(environ: Mapping[str, str]) -> str:
    """PYTHONPATH that makes this package importable in a replica, whatever its directory."""
    root = Path(__file__).resolve().parents[2]
    former = environ.get("PYTHONPATH", "")
    if root.name in ("site-packages", "dist-packages") or str(root) in former.split(os.pathsep):
        return former
    return os.pathsep.join(p for p in (str(root), former) if p)


def _int_option(args: Sequence[str], names: tuple[str, ...]) -> int:
    """The last value of an option that is given as `--name 2` or `--name=2`; 1 when absent."""
    found = 1
    for at, arg in enumerate(args):
        if option_name(arg) in names:
            value = arg.partition("=")[2] or (args[at + 1] if at + 1 < len(args) else "")
            if not value.isdigit() or int(value) < 1:
                raise LaunchRefused(f"vLLM option {arg} needs a positive number")
            found = int(value)
    return found
