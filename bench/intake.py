"""What it costs vLLM's server to take in a long prompt, by the form it comes in: `python -m bench.intake --model DIR`.

The engine's own work is kept small: a model of two thin layers with dummy weights and DIR's tokenizer, prompts that are in its
prefix cache, and one token to generate. So an answer's time is that of JSON, the tokenizer and the hand-over to the engine. The
forms are tried in shuffled order. `--rust PATH` adds vLLM's Rust front end of the same version (`vllm-rs` in vLLM's CUDA
wheels).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from bench.child_process import Started
from bench.field.flags import default_model
from bench.machine import StartFailed, free_ports
from engine.host_process.preload import server_module
from gateway.cli.bench.words import Words
from tests.gpu.replica import LLAMA_8B

MODEL = "intake"
BLOCK_TOKENS = 32
START_SECONDS_MAX = 180.0
ANSWER_SECONDS_MAX = 60.0
THIN = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its token ids, as a completion and as the only message of a chat."""

    text: str
    ids: list[int]
    chat_ids: list[int]


@dataclass(frozen=True, slots=True)
class Way:
    """A path, and how its body is made; `python_only`: vLLM's Rust front end does not have it."""

    name: str
    path: str
    body: Callable[[Prompt], Mapping[str, Any]]
    python_only: bool = False


def _chat(prompt: Prompt, **more: Any) -> Mapping[str, Any]:
    return {"messages": [{"role": "user", "content": prompt.text}], "max_tokens": 1, **more}


WAYS = (
    Way("completion, text", "/v1/completions", lambda prompt: {"prompt": prompt.text, "max_tokens": 1}),
    Way("completion, ids", "/v1/completions", lambda prompt: {"prompt": prompt.ids, "max_tokens": 1}),
    Way("chat, text", "/v1/chat/completions", _chat),
    Way(
        "chat, ids beside the text",
        "/v1/chat/completions",
        lambda prompt: _chat(prompt, kv_transfer_params={"prompt_token_ids": prompt.chat_ids}),
        python_only=True,
    ),
    Way(
        "ids in, ids out",
        "/inference/v1/generate",
        lambda prompt: {"token_ids": prompt.ids, "sampling_params": {"max_tokens": 1, "detokenize": False}},
        python_only=True,
    ),
)


def write_thin_model(folder: Path, tokenizer_directory: Path) -> Path:
    """Write a model directory: a thin Llama's config and the tokenizer of another model."""
    folder.mkdir()
    for path in tokenizer_directory.iterdir():
        if path.suffix in (".json", ".jinja", ".txt") and path.name != "config.json":
            shutil.copy(path, folder)
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | THIN | {"vocab_size": vocabulary}))
    return folder


def start(stack: ExitStack, directory: Path, model: Path, rust: str, tokens_max: int) -> str:
    """Start a server, wait until it is serving, and return its address. Raises StartFailed."""
    (port,) = free_ports(1)
    blocks = 4 * tokens_max // BLOCK_TOKENS
    engine = ["--load-format", "dummy", "--block-size", str(BLOCK_TOKENS), "--num-gpu-blocks-override", str(blocks)]
    engine += ["--max-model-len", str(tokens_max + 1024), "--max-num-batched-tokens", "8192", "--enforce-eager"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    env |= {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    if rust:
        argv = [rust, "serve", str(model), *where, "--python", sys.executable, "--", *engine]
        env |= {"PYTHONPATH": str(named_vllm(directory))}
    else:
        argv = [sys.executable, "-m", server_module(), "--model", str(model), *where, *engine]
        argv += ["--disable-uvicorn-access-log", "--enable-scale-out"]
    process = Started(argv, directory / f"{'rust' if rust else 'python'}.log", env)
    stack.callback(process.end)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START_SECONDS_MAX
    while not _serves(url):
        process.check(time.monotonic() < deadline)
        time.sleep(0.2)
    return url


def named_vllm(directory: Path) -> Path:
    """Make a directory for PYTHONPATH that gives vllm-cpu's version to a distribution `vllm`, which its command looks up."""
    version = version_of_vllm()
    about = directory / "named" / f"vllm-{version.partition('+')[0]}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return about.parent


def version_of_vllm() -> str:
    """Return the installed vLLM's version; the CPU build's ends with `+cpu`."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return f"{metadata.version('vllm-cpu').partition('+')[0]}+cpu"


def _serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def prompts(tokenizer: Tokenizer, url: str, lengths: Sequence[int]) -> list[Prompt]:
    """Return one prompt of about each length. Ids of chats are what the server at `url` makes of them."""
    words = Words(random.Random(time.time_ns()))
    made = []
    for length in lengths:
        text = words.text(length)
        asked = {"model": MODEL, "messages": [{"role": "user", "content": text}]}
        told = httpx.post(f"{url}/tokenize", json=asked, timeout=ANSWER_SECONDS_MAX).raise_for_status().json()
        made.append(Prompt(text, tokenizer.encode(text, add_special_tokens=False).ids, told["tokens"]))
    return made


def seconds(client: httpx.Client, url: str, way: Way, body: bytes) -> float:
    """Time from the request to its complete answer of one token. Raises httpx.HTTPStatusError."""
    began = time.perf_counter()
    answer = client.post(url + way.path, content=body, headers={"content-type": "application/json"})
    spent = time.perf_counter() - began
    answer.raise_for_status()
    return spent


def measure(given: argparse.Namespace, stack: ExitStack, console: Console) -> dict[tuple[str, int], list[float]]:
    """Measure the seconds of each form (named with its front end) and prompt length, in the order measured."""
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pkv-intake-", dir="/tmp")))
    model = write_thin_model(directory / "model", Path(given.model))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokens_max = max(given.lengths)
    with console.status("starting the servers"):
        fronts = {"": start(stack, directory, model, "", tokens_max)}
        if given.rust:
            fronts["Rust: "] = start(stack, directory, model, str(Path(given.rust).resolve()), tokens_max)
    asked = prompts(tokenizer, fronts[""], given.lengths)
    ways = [(front, way) for front in fronts for way in WAYS if not (front and way.python_only)]
    bodies = {
        (way.name, at): json.dumps({"model": MODEL, "temperature": 0, **way.body(prompt)}).encode()
        for way in WAYS
        for at, prompt in enumerate(asked)
    }
    found: dict[tuple[str, int], list[float]] = {}
    client = stack.enter_context(httpx.Client(timeout=ANSWER_SECONDS_MAX))
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("", total=(given.samples + 1) * len(asked))
        for at, length in enumerate(given.lengths):
            for sample in range(given.samples + 1):
                progress.update(bar, description=f"{length:,} tokens")
                for front, way in random.sample(ways, len(ways)):
                    spent = seconds(client, fronts[front], way, bodies[way.name, at])
                    if sample:  # the first request of each fills the prefix cache
                        found.setdefault((front + way.name, length), []).append(spent)
                progress.advance(bar)
    return found


def main() -> int:
    """Measure and print a table of milliseconds; status 1 if a server does not start or refuses a request."""
    parser = argparse.ArgumentParser(prog="bench.intake", description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="", help="directory with the tokenizer (default: peerkv's default model)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384, 32768], help="prompt lengths in tokens"
    )
    parser.add_argument("--samples", type=int, default=15, help="samples of each (default: 15)")
    parser.add_argument("--rust", default="", metavar="PATH", help="vllm-rs, to measure it as well")
    given = parser.parse_args()
    given.model = given.model or default_model()
    console = Console(stderr=True)
    try:
        with ExitStack() as stack:
            found = measure(given, stack, console)
    except (StartFailed, httpx.HTTPError) as error:
        console.print(f"intake: {error}", highlight=False, markup=False)
        return 1
    print(f"vLLM {version_of_vllm()}, {os.cpu_count()} cores; milliseconds, median (least)\n")
    print("| way | " + " | ".join(f"{length:,} tokens" for length in given.lengths) + " |")
    print("|---" * (1 + len(given.lengths)) + "|")
    for name in dict.fromkeys(name for name, _ in found):
        cells = [found[name, length] for length in given.lengths]
        print(
            f"| {name} | " + " | ".join(f"{statistics.median(each) * 1e3:.1f} ({min(each) * 1e3:.1f})" for each in cells) + " |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
