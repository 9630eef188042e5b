"""`python -m bench.tiers stores|restore|sessions|policies|scheduling|soak`."""

import argparse
import os
from pathlib import Path

from bench.machine import end_on_sigterm
from bench.tiers import policies, restore, scheduling, sessions, soak, stores


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
    kept = commands.add_parser("sessions", description=sessions.__doc__, help="how many sessions a replica keeps")
    kept.add_argument("--model", default="", metavar="DIR", help="model (default: the default model)")
    kept.add_argument("--tokens", type=int, default=4096, metavar="N", help="tokens of a session (default: 4096)")
    kept.add_argument("--kv-bytes", type=int, default=256 << 20, metavar="N", help="KV cache (default: 256 MiB)")
    kept.add_argument("--tier-bytes", type=int, default=256 << 20, metavar="N", help="host memory or disk (default: 256 MiB)")
    arms = [arm.name for arm in sessions.ARMS]
    kept.add_argument("--arms", nargs="+", choices=arms, default=(), metavar="NAME", help=f"(default: all, {'; '.join(arms)})")
    kept.add_argument("--first", type=int, default=1, metavar="N", help="sessions to begin with (default: 1)")
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
        sessions.run(given.model, given.tokens, given.kv_bytes, given.tier_bytes, given.directory, given.arms, given.first)
    else:
        restore.run(given.model, given.lengths, given.samples, given.directory)
    print(f"load average at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
