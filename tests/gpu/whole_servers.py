"""vLLM's own NixlConnector, and `peerkv serve` as a whole, beside imports."""

import contextlib
import subprocess
import sys
import time

from tests.gpu.engine_pair import Bench
from tests.gpu.replica import Replica, median, prompt


def nixl(bench: Bench) -> None:
    """The nearest thing in vLLM: NixlConnector hands over a finished request's blocks if both requests were marked for it."""
    config = {"kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"}}
    engines = []
    for n, device in enumerate(bench.scale.devices):
        environment = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(5600 + n), "UCX_TLS": "all"}
        engines.append(Replica(f"nixl-{n}", device, bench.scale.model, bench.tables, environment=environment, **config))
    a, b = (engine.ready() for engine in engines)
    mark = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None,
            "remote_host": None, "remote_port": None}  # fmt: skip
    try:
        for tokens in (2048, 8192, 32768):
            times: dict[str, list[float]] = {"cold": [], "handed over": [], "local": [], "unmarked": []}
            for turn in range(5):
                ids, plain = prompt(tokens, 3 * tokens + turn), prompt(tokens, 3 * tokens + turn + 900)
                given = a.ask(ids, 1, params=mark).params
                times["handed over"].append(b.ask(ids, 1, params=given).first_seconds)
                times["local"].append(b.ask(ids).first_seconds)
                times["cold"].append(b.ask(prompt(tokens, 3 * tokens + turn + 500)).first_seconds)
                a.ask(plain)
                times["unmarked"].append(b.ask(plain).first_seconds)
            ms = {kind.replace(" ", "_") + "_ms": median(values) * 1e3 for kind, values in times.items()}
            bench.row("nixl", tokens=tokens, **ms, params=sorted(given or {}))
    finally:
        a.stop()
        b.stop()


def serve(bench: Bench) -> None:
    """`peerkv serve` with a replica on each GPU, driven by the openai client."""
    import httpx
    import openai

    url = "http://127.0.0.1:8707"
    command = [sys.executable, "-m", "gateway.cli", "serve", str(bench.scale.model), "--port", "8707"]
    arguments = ["--load-format", "dummy", "--max-model-len", "65536", "--max-num-batched-tokens", "16384", "--enforce-eager"]
    process = subprocess.Popen([*command, "--", *arguments], stdin=subprocess.DEVNULL)
    try:
        _wait_ready(process, url, 280)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        for tokens in (2048, 8192, 32768):
            times: dict[str, list[float]] = {"cold": [], "import": [], "local": []}
            for turn in range(5):
                ids = prompt(tokens, 17 * tokens + turn)
                for kind, replica in (("cold", "replica-0"), ("import", "replica-1"), ("local", "replica-1")):
                    began = time.perf_counter()
                    headers = {"x-peerkv-replica": replica}
                    client.completions.create(model=str(bench.scale.model), prompt=ids, max_tokens=1, extra_headers=headers)
                    times[kind].append(time.perf_counter() - began)
            bench.row("serve", tokens=tokens, **{kind + "_ms": median(values) * 1e3 for kind, values in times.items()})
        stats = httpx.get(f"{url}/kv/stats", timeout=20).json()
        bench.row("serve", tokens_by_source=stats["totals"]["tokens"], counts=stats["totals"]["counts"])
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()


def _wait_ready(process: "subprocess.Popen[bytes]", url: str, seconds: float) -> None:
    import httpx

    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            found = httpx.get(f"{url}/ready", timeout=5)
            if found.status_code == 200 and all(replica["ready"] for replica in found.json()["replicas"]):
                return
        time.sleep(1)
    raise TimeoutError(f"peerkv serve is not ready, exit status {process.poll()}")
