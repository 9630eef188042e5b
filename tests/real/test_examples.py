"""The programs of examples/ do what they say, on the fleet of these tests."""

import subprocess
import sys

import pytest

from tests.real.conftest import ONE, TWO
from tests.real.fleet import ANSWER_SECONDS_MAX, REPLICAS, ROOT

KEYS = [tenant.api_key.get_secret_value() for tenant in (ONE, TWO)]


def run(name: str, *arguments: str) -> str:
    """What the example prints; it must end with status 0."""
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS_MAX, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_openai_client_answers_and_streams(fleet):
    printed = run("openai_client.py", "--url", fleet.url, "--key", fleet.key)
    lines = dict(line.split(":", 1) for line in printed.splitlines())
    assert "Paris" in lines["answer"]
    assert lines["stream"].strip() == lines["answer"].strip()
    assert "computed=" in lines["cache"]


def test_plain_servers_share_what_one_computed(fleet):
    printed = run("plain_servers.py", "--servers", *(f"unix:{fleet.run_dir / name}.sock" for name in REPLICAS))
    assert "copied from the first one" in printed
    assert "the same answer" in printed


def test_a_prefix_is_pinned_before_a_rush(fleet):
    printed = run("pin_before_a_rush.py", "--url", fleet.url, "--key", fleet.key, "--tenant", ONE.name)
    assert "on 2 replicas" in printed
    assert printed.count("computed\n") == 8


def test_an_import_is_compared_with_a_cold_run(fleet):
    printed = run("compare_import.py", "--url", fleet.url, "--key", fleet.key)
    assert "tokens: the same" in printed


def test_a_tenant_sees_its_own_cache_alone(fleet):
    printed = run("what_a_tenant_sees.py", "--url", fleet.url, "--keys", *KEYS)
    assert printed.count("computed=") == 3
    assert "cache_salt" in printed


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_says_how_it_is_run(name):
    assert f"python examples/{name}" in (ROOT / "examples" / name).read_text()
