"""Two plain vLLM servers share KV by peerkv's connector alone, without the gateway: one copies what the other computed.

    python examples/plain_servers.py MODEL [vLLM's options]    # starts two servers on this machine, asks, and ends them
    python examples/plain_servers.py --servers URL URL         # asks two that run already; unix:PATH is a socket

On the CPU these options are needed: --block-size 32 --kv-cache-memory-bytes 268435456 --max-model-len 2048 --enforce-eager
--worker-cls engine.connector.cpu_worker.CpuWorker, and in the environment VLLM_ENABLE_V1_MULTIPROCESSING=0
VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1.

What makes a server share is `--kv-transfer-config` with a `table_dir` that both have, and a name of its own for each.
To have another connector beside peerkv's, see docs/migrating.md.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]  # where the connector's package is, unless peerkv is installed
START_SECONDS_MAX = 600.0
TABLE_DIR = f"/dev/shm/peerkv-example-{os.getpid()}"


def start(stack: contextlib.ExitStack, model: str, directory: str, name: str, more: list[str]) -> str:
    """Start one server, and return its socket."""
    config = {
        "kv_connector": "PeerKVConnector",
        "kv_connector_module_path": "engine.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"table_dir": TABLE_DIR, "replica": name},
    }
    socket = f"{directory}/{name}.sock"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--uds", socket]
    command += ["--kv-transfer-config", json.dumps(config), "--enable-prompt-tokens-details", *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "0"}
    with Path(f"{directory}/{name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        with contextlib.suppress(httpx.TransportError), client(f"unix:{socket}") as asked:
            if asked.get("/health").status_code == 200:
                return f"unix:{socket}"
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(Path(f"{directory}/{name}.log").read_text()[-2000:])
        time.sleep(0.5)


def client(url: str) -> httpx.Client:
    if url.startswith("unix:"):
        return httpx.Client(base_url="http://server", transport=httpx.HTTPTransport(uds=url.removeprefix("unix:")), timeout=120)
    return httpx.Client(base_url=url, timeout=120)


def ask(url: str, prompt: str) -> tuple[str, int, float]:
    """The answer, how many of the prompt's tokens came from a cache, and the seconds that it took."""
    with client(url) as asked:
        model = asked.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        began = time.perf_counter()
        answer = asked.post("/v1/completions", json=body).raise_for_status().json()
        seconds = time.perf_counter() - began
    details = answer["usage"].get("prompt_tokens_details") or {}
    return answer["choices"][0]["text"], details.get("cached_tokens") or 0, seconds


parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", help="directory or hub id")
parser.add_argument("--servers", nargs=2, metavar="URL")
given, more = parser.parse_known_args()
if not given.servers and not given.model:
    parser.error("give a MODEL, or two --servers")

with contextlib.ExitStack() as stack:
    servers = given.servers
    if not servers:
        stack.callback(shutil.rmtree, TABLE_DIR, ignore_errors=True)
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="peerkv-example-"))
        servers = [start(stack, given.model, directory, name, more) for name in ("one", "two")]
    prompt = f"Run {time.time_ns()}. " + " ".join(f"Item {number} of the inventory is blue." for number in range(60))
    first = ask(servers[0], prompt)
    second = ask(servers[1], prompt)
    print(f"first server:  {first[1]:4d} tokens from a cache, {first[2]:.2f} s")
    print(f"second server: {second[1]:4d} tokens from a cache, {second[2]:.2f} s: copied from the first one")
    if not second[1] > first[1]:
        sys.exit("the second server computed the prompt again: do both have the same model, options and table_dir?")
    print("the same answer" if first[0] == second[0] else "another answer: rounding, as with any prefix cache")
