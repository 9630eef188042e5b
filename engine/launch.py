"""How a replica is started: its settings, its command line, its environment, its devices."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """All that the supervisor needs to run replicas. Directories are absolute; times are seconds."""

    model: str  # a directory, or a hub id
    run_dir: Path
    table_dir: Path
    log_dir: Path
    served_model_name: str = ""  # empty: the same as `model`
    replicas: int = 2
    devices: tuple[str, ...] = ()  # GPU ids as CUDA_VISIBLE_DEVICES takes them; empty: CPU
    vllm_args: tuple[str, ...] = ()  # the user's own, they win over ours
    namespace: str = ""  # replicas of different namespaces exchange nothing
    hash_name: str = "xxh3_128"
    connector: bool = True  # False: plain vLLM without our connector
    preload: bool = False  # import vllm once, fork the replicas (CPU)
    launcher: tuple[str, ...] | None = None  # run this in place of vLLM's server
    startup_seconds_max: float = 600.0
    health_interval_seconds: float = 2.0
    health_timeout_seconds: float = 10.0
    health_failures_max: int = 3  # unanswered checks in a row before a replica is restarted
    backoff_seconds_min: float = 0.5
    backoff_seconds_max: float = 30.0
    healthy_seconds_reset: float = 60.0  # ready for so long: the back-off starts anew
    start_failures_max: int = 3  # in a row without getting ready: give up on the replica
    terminate_seconds: float = 10.0  # from SIGTERM to SIGKILL
    log_bytes_max: int = 16 << 20  # a longer log is rotated when the replica starts
