"""`peerkv bench` on real replicas."""

import json
import os
import subprocess
import sys

from tests.real.fleet import ANSWER_SECONDS_MAX, ROOT

LENGTH = 320


def test_the_bench_finds_cold_prompts_imports_and_local_hits(fleet, tmp_path):
    written = tmp_path / "bench.json"
    command = [sys.executable, "-m", "gateway.cli", "bench", "--url", fleet.url, "--api-key", fleet.key, "--json", str(written)]
    command += ["--only", "first-token", "throughput", "--lengths", str(LENGTH), "--samples", "2"]
    command += ["--rate", "2", "--seconds", "2", "--prefixes", "1", "--answer-tokens", "2"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PEERKV_")} | {
        "PYTHONPATH": str(ROOT)
    }
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=ANSWER_SECONDS_MAX)
    assert done.returncode == 0, done.stderr
    found = json.loads(written.read_text())
    seconds = found["first_token"][0]["seconds"]
    assert {kind: each["count"] for kind, each in seconds.items()} == {"cold": 2, "import": 2, "local hit": 2}, done.stdout
    assert seconds["local hit"]["median"] < seconds["cold"]["median"]
    assert found["throughput"]["failures"] == 0
    assert "import/this" in done.stdout
