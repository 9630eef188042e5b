"""`python -m bench.tiers stores|restore|sessions|policies|scheduling|soak`."""

import argparse
import os
import shlex
from pathlib import Path

from bench.machine import end_on_sigterm
from bench.tiers import policies, restore, scheduling, sessions, soak, stores

CPU_BYTES = 256 << 20
GPU_KV_BYTES, GPU_TIER_BYTES = 4 << 30, 8 << 30
"""For 8 sessions of 4,096 tokens of the 8B shape, and for twice as many."""
GPU_VLLM = (
    "--load-format dummy --block-size 16 --max-model-len 8192 --max-num-batched-tokens 8192 --enforce-eager "
    "--gpu-memory-utilization 0.2"
)


def _add_sessions(kept: argparse.ArgumentParser) -> None:
    arms = [arm.name for arm in sessions.ARMS]
    kept.add_argument("--engines", choices=("cpu", "gpu"), default="cpu", help="gpu: 8B shape, dummy weights")
    kept.add_argument("--model", default="", metavar="DIR", help="model (default: the default model; gpu: a generated one)")
    kept.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of a session (default: 4096)")
    kept.add_argument("--kv-bytes", type=int, metavar="N", help="KV cache (default: 256 MiB; gpu: 4 GiB)")
    kept.add_argument("--tier-bytes", type=int, metavar="N", help="host memory or disk (default: 256 MiB; gpu: 8 GiB)")
    kept.add_argument("--arms", nargs="+", choices=arms, default=(), metavar="NAME", help=f"(default: all, {'; '.join(arms)})")
    kept.add_argument(
        "--first", type=int, metavar="N", help="sessions to begin with; 0: by the room that there is (default: 1; gpu: 0)"
    )
    kept.add_argument("--beside", type=int, default=1, metavar="N", help="arms that are measured at once (default: 1)")
    kept.add_argument("--vllm-args", metavar="ARGS", help=f"for the replica (default: none; gpu: {GPU_VLLM})")
    kept.add_argument(
        "--turns", type=Path, metavar="FILE", help="measure when no other bench (tests.gpu.bench) that was given FILE does"
    )
    kept.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE as they come")


def _run_sessions(given: argparse.Namespace) -> None:
    gpu = given.engines == "gpu"
    sizes = sessions.Sizes(
        given.model,
        given.tokens,
        given.kv_bytes or (GPU_KV_BYTES if gpu else CPU_BYTES),
        given.tier_bytes or (GPU_TIER_BYTES if gpu else CPU_BYTES),
        gpu,
        tuple(shlex.split(given.vllm_args if given.vllm_args is not None else GPU_VLLM if gpu else "")),
    )
    first = given.first if given.first is not None else 0 if gpu else 1
    sessions.run(sizes, given.directory, given.arms, first, beside=given.beside, turns=given.turns, file=given.json)


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(prog="python -m bench.tiers", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory", type=Path, metavar="DIR", help="on the disk to measure (default: where temporary files are)"
    )
    commands = parser.add_subparsers(dest="what", required=True)
    plain = commands.add_parser("stores", description=stores.__doc__, help="GB/s of disk and vault, without an engine")
    plain.add_argument("--frames", type=int, default=256, metavar="N", help="frames of a round (default: 256, 0.5 GiB)")
    plain.add_argument("--rounds", type=int, default=5, metavar="N", help="rounds (default: 5)")
    whole = commands.add_parser("restore", description=restore.__doc__, help="time to the first token, with a real engine")
    whole.add_argument("--model", default="", metavar="DIR", help="model (default: the default model)")
    whole.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000], metavar="N", help="tokens (default: 1000 4000)")
    whole.add_argument("--samples", type=int, default=3, metavar="N", help="prompts of each length (default: 3)")
    _add_sessions(commands.add_parser("sessions", description=sessions.__doc__, help="how many sessions a replica keeps"))
    replayed = commands.add_parser("policies", description=policies.__doc__, help="what a tier should keep, by recorded traces")
    replayed.add_argument("traces", type=Path, nargs="+", metavar="TRACE", help="JSON lines with hash_ids, as Mooncake's")
    commands.add_parser("scheduling", description=scheduling.__doc__, help="what host memory takes of a scheduler's step")
    long = commands.add_parser("soak", description=soak.__doc__, help="whether anything grows while all tiers evict")
    long.add_argument("--model", default="", metavar="DIR", help="model (default: the default model)")
    long.add_argument("--minutes", type=float, default=15, metavar="N", help="for all block sizes together (default: 15)")
    sizes = [32, 64, 128]
    long.add_argument("--block-sizes", type=int, nargs="+", default=sizes, metavar="N", help="tokens (default: 32 64 128)")
    given = parser.parse_args()
    end_on_sigterm()
    if given.what == "stores":
        stores.run(given.directory, given.frames, given.rounds)
    elif given.what == "policies":
        policies.run(given.traces)
    elif given.what == "scheduling":
        scheduling.run()
    elif given.what == "soak":
        soak.run(given.model, given.block_sizes, given.minutes, given.directory)
    elif given.what == "sessions":
        _run_sessions(given)
    else:
        restore.run(given.model, given.lengths, given.samples, given.directory)
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
