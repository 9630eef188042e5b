"""vLLM's own NixlConnector, and `peerkv serve` as a whole, beside imports."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.intake import named_vllm
from engine.host_process.preload import server_module
from tests.gpu.engine_pair import Bench
from tests.gpu.replica import Replica, median, prompt

if TYPE_CHECKING:
    import httpx
    import openai

REPEATS = 5


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
    """`peerkv serve` with two replicas, by the openai client and by a plain HTTP client whose body is ready beforehand.

    On one GPU both share it by `--replicas-per-gpu`, and each takes the share of its memory that peerkv gives it.
    """
    import httpx
    import openai

    url, model = "http://127.0.0.1:8707", str(bench.scale.model)
    command = [sys.executable, "-m", "gateway.cli", "serve", model, "--port", "8707", "--served-model-name", "model"]
    command += ["--host-memory", "0"]
    arguments = {"load_format": "dummy", "max_model_len": 65536, "max_num_batched_tokens": 16384, "enforce_eager": True}
    one, other = bench.scale.devices
    if one and one == other:
        command += ["--replicas", "2", "--replicas-per-gpu", "2"]
    else:
        command += [] if one else ["--replicas", "2"]
        arguments |= bench.scale.arguments
    process = subprocess.Popen([*command, "--", *_flags(arguments)], stdin=subprocess.DEVNULL)
    try:
        _wait_ready(process, url, 280)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60)
        with bench.turn(), httpx.Client(base_url=url, timeout=60) as plain:
            for tokens in bench.scale.exact:
                before = _imported(plain)
                times: dict[str, list[float]] = {}
                for turn in range(REPEATS):
                    for kind, seconds in _served(plain, client, tokens, turn).items():
                        times.setdefault(kind, []).append(seconds)
                imported = _imported(plain) - before
                bench.row("serve", tokens=tokens, **{kind + "_ms": median(values) * 1e3 for kind, values in times.items()},
                          imports=2 * REPEATS, imported_tokens=imported)  # fmt: skip
            stats = plain.get("/kv/stats", timeout=20).json()
        bench.row("serve", tokens_by_source=stats["totals"]["tokens"], counts=stats["totals"]["counts"])
    finally:
        _end(process)


def _imported(plain: "httpx.Client") -> int:
    """Return the prompt tokens that came from another replica so far."""
    tokens: dict[str, int] = plain.get("/kv/stats", timeout=20).json()["totals"]["tokens"]
    return sum(count for source, count in tokens.items() if source.startswith("peer_"))


def _served(plain: "httpx.Client", client: "openai.OpenAI", tokens: int, turn: int) -> dict[str, float]:
    """Seconds of two prompts, each computed by one replica and asked for twice of the other, by either client."""
    seconds: dict[str, float] = {}
    for by, seed in (("", 17), ("_openai_client", 19)):
        ids = prompt(tokens, seed * tokens + turn)
        body = json.dumps({"model": "model", "prompt": ids, "max_tokens": 1}).encode()
        for kind, replica in (("cold", "replica-0"), ("import", "replica-1"), ("local", "replica-1")):
            where, began = {"x-peerkv-replica": replica}, time.perf_counter()
            if by:
                client.completions.create(model="model", prompt=ids, max_tokens=1, extra_headers=where)
            else:
                headers = where | {"content-type": "application/json"}
                plain.post("/v1/completions", content=body, headers=headers).raise_for_status()
            seconds[kind + by] = time.perf_counter() - began
    return seconds


def front_ends(bench: Bench) -> None:
    """vLLM's Python server and its Rust front end, each with our connector: a hit by either, and an import between them.

    Needs `vllm-rs`, which vLLM's CUDA wheels bring, or its path in VLLM_RUST_FRONTEND_PATH. Bodies are ready beforehand, so the
    times are those of the servers: JSON, checks, hand-over, the engine's own work.
    """
    import httpx

    folder = Path(tempfile.mkdtemp(prefix="peerkv-front-"))
    with contextlib.ExitStack() as stack:
        clients: dict[str, httpx.Client] = {}
        for name, device in zip(("python", "rust"), bench.scale.devices, strict=True):
            process = subprocess.Popen(
                _front_end(bench, name, folder), stdin=subprocess.DEVNULL, env=_environment(device, folder), cwd=Path.cwd()
            )
            stack.callback(_end, process)
            client = httpx.Client(
                transport=httpx.HTTPTransport(uds=str(folder / f"{name}.sock")), base_url="http://s", timeout=60
            )
            clients[name] = stack.enter_context(client)
            _wait_serving(process, client, 280)
        stack.enter_context(bench.turn())
        for tokens in bench.scale.exact:
            _front_ends_at(bench, clients, tokens)


def _front_ends_at(bench: Bench, clients: "dict[str, httpx.Client]", tokens: int) -> None:
    times: dict[str, list[float]] = {}
    same = cached = 0
    for turn in range(REPEATS):
        ids = prompt(tokens, 23 * tokens + turn)
        answers = []
        for name, kind, source in (
            ("python", "cold", ""), ("python", "hit", ""), ("rust", "import", "python"), ("rust", "hit", ""),
        ):  # fmt: skip
            body = {"model": "model", "prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 3}
            given = json.dumps(body | {"kv_transfer_params": {"peerkv": {"source": source}}}).encode()
            began = time.perf_counter()
            answer = clients[name].post("/v1/completions", content=given, headers={"content-type": "application/json"})
            times.setdefault(f"{name}_{kind}", []).append(time.perf_counter() - began)
            found = answer.raise_for_status().json()
            chosen = found["choices"][0]["logprobs"]["token_logprobs"]
            answers.append((found["choices"][0]["text"], [round(each, 4) for each in chosen]))  # Rust prints single precision
            details = found["usage"].get("prompt_tokens_details") or {}
            cached += kind == "import" and (details.get("cached_tokens") or 0) >= tokens // 2
        same += answers[1] == answers[2] == answers[3]
    ms = {kind + "_ms": median(values) * 1e3 for kind, values in times.items()}
    bench.row("front ends", tokens=tokens, **ms, same_answers=f"{same} of {REPEATS}", imported=f"{cached} of {REPEATS}")


def _front_end(bench: Bench, name: str, folder: Path) -> list[str]:
    config = {"kv_connector": "PeerKVConnector", "kv_connector_module_path": "engine.connector", "kv_role": "kv_both",
              "kv_connector_extra_config": {"table_dir": str(bench.tables), "replica": name}}  # fmt: skip
    arguments = {"load_format": "dummy", "max_model_len": 65536, "max_num_batched_tokens": 16384, "enforce_eager": True}
    flags = [*_flags(arguments | bench.scale.arguments), "--kv-transfer-config", json.dumps(config)]
    model, where = str(bench.scale.model), ["--uds", str(folder / f"{name}.sock"), "--served-model-name", "model"]
    if name == "python":
        return [sys.executable, "-m", server_module(), "--model", model, *where, "--enable-prompt-tokens-details", *flags]
    rust = os.environ.get("VLLM_RUST_FRONTEND_PATH") or str(Path(str(find_spec("vllm").origin)).with_name("vllm-rs"))  # type: ignore[union-attr]
    return [rust, "serve", model, *where, "--enable-prompt-tokens-details", "--python", sys.executable, "--", *flags]


def _environment(device: str, folder: Path) -> dict[str, str]:
    own = {"CUDA_VISIBLE_DEVICES": device, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    paths = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
    if not device:
        paths.insert(0, str(named_vllm(folder)))
        own |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return os.environ | own | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _flags(arguments: dict[str, Any]) -> list[str]:
    """Return engine arguments as vLLM's command line takes them."""
    flags: list[str] = []
    for name, value in arguments.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(60)
    process.kill()


def _wait_serving(process: "subprocess.Popen[bytes]", client: "httpx.Client", seconds: float) -> None:
    import httpx

    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if client.get("/health", timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise TimeoutError(f"a server is not ready, exit status {process.poll()}")


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
