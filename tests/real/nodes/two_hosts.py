"""`python -m tests.real.nodes.two_hosts` measures first tokens of imports between hosts, over 1 and 10 Gbit/s. Needs root."""

import argparse
import statistics
import subprocess

from tests.real.nodes.hosts import Host, prompt, running_hosts


def limit(host: Host, rate: str, burst: str = "1mb") -> None:
    """Let a host send at most so much, such as 1gbit."""
    shape = ["root", "tbf", "rate", rate, "burst", burst, "latency", "50ms"]
    subprocess.run(["tc", "-n", host.space, "qdisc", "replace", "dev", host.cable, *shape], check=True)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--rates", nargs="+", default=["1gbit", "10gbit"])
    parser.add_argument("--samples", type=int, default=5)
    given = parser.parse_args()
    with running_hosts(2) as (one, other):
        print("seconds to one token, medians: computed, imported from the other node, local hit")
        for rate in given.rates:
            for host in (one, other):
                limit(host, rate)
            for items in given.items:
                rows: list[tuple[float, float, float]] = []
                tokens = 0
                for sample in range(given.samples):
                    text = prompt(f"{rate} {items} {sample}", items)
                    cold = one.ask(text, "replica-0", 1)
                    imported = other.ask(text, "replica-0", 1)
                    local = other.ask(text, "replica-0", 1)
                    assert imported.tokens("peer"), imported
                    tokens = imported.tokens("peer")
                    rows.append((cold.seconds, imported.seconds, local.seconds))
                medians = " ".join(f"{statistics.median(column):8.3f}" for column in zip(*rows, strict=True))
                print(f"{rate:>7} {tokens:6} tokens imported {medians}", flush=True)


if __name__ == "__main__":
    main()
