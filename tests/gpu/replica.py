"""A vLLM engine in a process of its own, stepped by hand: what GPU tests and the GPU bench drive.

The parent talks to it through a pipe. Every wait has a deadline, so that a hang ends the test and not the session.
"""

import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import random
import signal
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_model(folder: Path, **changes: Any) -> Path:
    """Write a config of the 8B Llama shape and a tokenizer of numbered words; weights are vLLM's dummies."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes))
    words = {f"w{i}": i for i in range(LLAMA_8B["vocab_size"])}  # type: ignore[call-overload]
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w2", "model_max_length": 131072}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def prompt(tokens: int, seed: int, end: int = 128000) -> list[int]:
    """Return random token ids below `end`, equal for equal seeds."""
    rng = random.Random(seed)
    return [rng.randrange(10, end) for _ in range(tokens)]


@dataclass
class Answer:
    """What became of a request: ids, log-probabilities, seconds to the first token, prompt tokens that were not computed."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    first_seconds: float = 0.0
    cached: int = 0
    params: dict[str, Any] | None = None
    preempted: int = 0

    def same_as(self, other: "Answer") -> bool:
        """Whether tokens and log-probabilities are the same to the last bit."""
        return (self.tokens, self.logprobs) == (other.tokens, other.logprobs)


class Replica:
    """The parent's handle. `device` is what the engine sees of the GPUs, `programs` a gather's size if not the transport's own;
    `arguments` go to vllm.EngineArgs."""

    def __init__(
        self,
        name: str,
        device: str,
        model: Path,
        table_dir: Path,
        programs: int = 0,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.gpu.preload"])
        self._pipe, theirs = context.Pipe()
        given = (name, {"CUDA_VISIBLE_DEVICES": device} | (environment or {}), str(model), str(table_dir), programs, arguments)
        self.process = context.Process(target=_run, args=(*given, theirs))
        self.process.start()
        atexit.register(self.kill)

    def ready(self, seconds: float = 240.0) -> "Replica":
        """Wait for the engine."""
        assert self._take(seconds) == "ready"
        return self

    def _take(self, seconds: float) -> Any:
        if not self._pipe.poll(seconds):
            raise TimeoutError(f"{self.name} did not answer in {seconds} s")
        kind, value = self._pipe.recv()
        if kind == "fault":
            raise RuntimeError(f"{self.name}: {value}")
        return value

    def ask(
        self,
        ids: list[int],
        tokens: int = 1,
        *,
        logprobs: bool = False,
        source: str | None = None,
        params: dict[str, Any] | None = None,
        seconds: float = 60,
        **more: Any,
    ) -> Answer:
        """Run one request to its end. `source` is the gateway's hint: a replica's name, "" for no import; or whole `params`.

        `more` goes into vLLM's prompt (`cache_salt`, `multi_modal_data`), `lora` aside: an adapter's name, number and path.
        """
        self.begin(ids, tokens, logprobs=logprobs, source=source, params=params, **more)
        return self.end(seconds)

    def ask_all(self, prompts: list[list[int]], tokens: int, seconds: float = 60) -> list[Answer]:
        """Run requests beside each other to their ends."""
        self._pipe.send(("batch", (prompts, tokens)))
        answers: list[Answer] = self._take(seconds)
        return answers

    def begin(
        self,
        ids: list[int],
        tokens: int = 1,
        *,
        logprobs: bool = False,
        source: str | None = None,
        params: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """Send a request and do not wait for it."""
        hint = {"peerkv": {"source": source}} if source is not None else params
        self._pipe.send(("ask", (ids, tokens, logprobs, hint, more)))

    def end(self, seconds: float = 60) -> Answer:
        """Wait for the request that was begun."""
        answer: Answer = self._take(seconds)
        return answer

    def shortfalls(self, ids: list[int], begin: int, seconds: float = 60) -> list[float]:
        """Compute a text anew; return by how much the log-probability of each token from `begin` on is below the best one's."""
        self._pipe.send(("shortfalls", (ids, begin)))
        below: list[float] = self._take(seconds)
        return below

    def load(self, requests: int, prompt_tokens: int, tokens: int, seed: int) -> None:
        """Start background requests, which run beside whatever is asked, in place of those that ran so far."""
        self._pipe.send(("load", (requests, prompt_tokens, tokens, seed)))
        assert self._take(120) == "loaded"

    def churn(self, prompt_tokens: int, on: bool) -> None:
        """Keep a prefill of fresh prompts of this length running beside everything else, or stop that."""
        self._pipe.send(("churn", prompt_tokens if on else 0))
        assert self._take(60) == "churning"

    def rest(self, seconds: float) -> None:
        """Have the engine become idle, as a server's does by itself when its last request has ended, and stay so."""
        self._pipe.send(("rest", None))
        assert self._take(20) == "resting"
        time.sleep(seconds)

    def clear(self) -> None:
        """End the background requests and empty the prefix cache."""
        self._pipe.send(("clear", None))
        assert self._take(60) == "cleared"

    def sleep(self) -> None:
        """Have the engine give its GPU memory back (vLLM's sleep mode, level 1)."""
        self._pipe.send(("sleep", None))
        assert self._take(60) == "sleeping"

    def wake(self) -> None:
        """Have it come back from there."""
        self._pipe.send(("wake", None))
        assert self._take(60) == "awake"

    def trace(self) -> None:
        """Time the parts of every request from now on (tests.gpu.step_times)."""
        self._pipe.send(("trace", None))
        assert self._take(20) == "tracing"

    def traced(self) -> list[tuple[str, float, float]]:
        """Return the last request's calls: (part, milliseconds after it was asked, milliseconds it took)."""
        self._pipe.send(("traced", None))
        calls: list[tuple[str, float, float]] = self._take(20)
        return calls

    def forget(self) -> None:
        """End the background requests and empty the prefix cache and host memory."""
        self._pipe.send(("forget", None))
        assert self._take(60) == "forgotten"

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.join(20)

    def stop(self) -> None:
        """End it in order; SIGKILL if that takes long."""
        with contextlib.suppress(OSError):
            self._pipe.send(("stop", None))
        self.process.join(20)
        if self.process.is_alive():
            self.kill()


def median(values: list[float]) -> float:
    return statistics.median(values)


def _run(
    name: str,
    environment: dict[str, str],
    model: str,
    table_dir: str,
    programs: int,
    arguments: dict[str, Any],
    pipe: Connection,
) -> None:
    os.environ.update(environment)
    logging.basicConfig(level=logging.INFO)  # vLLM sets up its own loggers only: what ours say of an import would be lost
    try:
        if programs:
            from transport.backends import cuda_ipc

            cuda_ipc.PROGRAMS_ALONE = cuda_ipc.PROGRAMS_BESIDE_DECODES = programs
        _Engine(name, model, table_dir, arguments, pipe).serve()
    except BaseException as error:
        import traceback

        pipe.send(("fault", f"{error!r}\n{traceback.format_exc()[-3000:]}"))
        raise


class _Engine:
    def __init__(self, name: str, model: str, table_dir: str, arguments: dict[str, Any], pipe: Connection) -> None:
        from vllm import EngineArgs, LLMEngine

        config = {
            "kv_connector": "PeerKVConnector",
            "kv_connector_module_path": "engine.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"table_dir": table_dir, "replica": name, "lossy": arguments.pop("lossy", "")},
        }
        config = arguments.pop("kv_transfer_config", config)
        chosen = {"load_format": "dummy", "max_model_len": 65536, "max_num_batched_tokens": 16384, "enforce_eager": True}
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(model=model, kv_transfer_config=config, disable_log_stats=True, **(chosen | arguments))
        )
        self.words = min(128000, int(self.engine.vllm_config.model_config.get_vocab_size()))
        self.pipe = pipe
        self.number = 0
        self.asked = ""
        self.answer = Answer()
        self.began = 0.0
        self.churn_tokens = 0
        self.background: set[str] = set()
        pipe.send(("ok", "ready"))

    def serve(self) -> None:
        while True:
            busy = self.engine.has_unfinished_requests()
            while self.pipe.poll(0 if busy or self.churn_tokens else 1.0):
                kind, value = self.pipe.recv()
                if kind == "stop":
                    return
                getattr(self, "do_" + kind)(value)
                busy = self.engine.has_unfinished_requests()
            if self.churn_tokens and not any(name.startswith("churn") for name in self.background):
                self.add("churn", prompt(self.churn_tokens, time.time_ns(), self.words), 1)
            if self.engine.has_unfinished_requests():
                self.step()

    def add(
        self,
        kind: str,
        ids: list[int],
        tokens: int,
        logprobs: bool = False,
        params: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
    ) -> str:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        self.number += 1
        name = f"{kind}-{self.number}"
        extra = {"kv_transfer_params": params} if params is not None else None
        sampling = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            ignore_eos=True,
            logprobs=5 if logprobs else None,
            extra_args=extra,
            detokenize=False,
        )
        given = dict(more or {})
        lora = given.pop("lora", None)
        whole: Any = {"prompt_token_ids": ids} | given
        self.engine.add_request(name, whole, sampling, lora_request=LoRARequest(*lora) if lora else None)
        if kind != "ask":
            self.background.add(name)
        return name

    def step(self) -> None:
        outputs = self.engine.step()
        now = time.perf_counter()
        for output in outputs:
            if output.request_id == self.asked:
                if not self.answer.first_seconds and output.outputs[0].token_ids:
                    self.answer.first_seconds = now - self.began
                if output.finished:
                    self.finish(output)
            elif output.finished:
                self.background.discard(output.request_id)

    def finish(self, output: Any) -> None:
        done = output.outputs[0]
        self.answer.tokens = list(done.token_ids)
        self.answer.cached = output.num_cached_tokens
        self.answer.params = output.kv_transfer_params
        self.answer.logprobs = [sorted((k, v.logprob) for k, v in row.items()) for row in done.logprobs or ()]
        self.asked = ""
        self.pipe.send(("ok", self.answer))

    def do_ask(self, value: Any) -> None:
        ids, tokens, logprobs, params, more = value
        self.answer = Answer()
        self.began = time.perf_counter()
        self.asked = self.add("ask", ids, tokens, logprobs, params, more)

    def do_batch(self, value: Any) -> None:
        prompts, tokens = value
        names = [self.add("ask", ids, tokens) for ids in prompts]
        answers = {name: Answer() for name in names}
        requests = self.engine.engine_core.engine_core.scheduler.requests  # type: ignore[attr-defined]
        while self.engine.has_unfinished_requests():
            for request in requests.values():
                answer = answers.get(request.request_id.rsplit("-", 1)[0])
                if answer is not None:
                    answer.preempted = request.num_preemptions
            for output in self.engine.step():
                if output.finished and output.request_id in answers:
                    answer = answers[output.request_id]
                    answer.tokens, answer.cached = list(output.outputs[0].token_ids), output.num_cached_tokens
        self.pipe.send(("ok", [answers[name] for name in names]))

    def do_shortfalls(self, value: Any) -> None:
        from vllm import SamplingParams

        ids, begin = value
        given: Any = {"prompt_token_ids": ids}
        self.number += 1
        name = f"shortfalls-{self.number}"
        self.engine.add_request(name, given, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False))
        rows: Any = None
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                rows = output.prompt_logprobs or rows
        places = range(begin, len(ids))
        self.pipe.send(("ok", [max(v.logprob for v in rows[at].values()) - rows[at][ids[at]].logprob for at in places]))

    def do_sleep(self, _: Any) -> None:
        self.abandon()
        self.engine.sleep(1)
        self.pipe.send(("ok", "sleeping"))

    def do_wake(self, _: Any) -> None:
        self.engine.wake_up()
        self.pipe.send(("ok", "awake"))

    def do_trace(self, _: Any) -> None:
        from tests.gpu.step_times import trace_engine

        self.tracing = trace_engine(self.engine)
        self.pipe.send(("ok", "tracing"))

    def do_traced(self, _: Any) -> None:
        self.pipe.send(("ok", self.tracing.take(int(self.began * 1e9))))

    def do_load(self, value: Any) -> None:
        requests, prompt_tokens, tokens, seed = value
        self.abandon()
        for number in range(requests):
            self.add("load", prompt(prompt_tokens, seed * 1000 + number, self.words), tokens)
        for _ in range(requests * prompt_tokens // 8192 + 8):
            self.step()
        self.pipe.send(("ok", "loaded"))

    def do_churn(self, value: Any) -> None:
        self.churn_tokens = value
        self.pipe.send(("ok", "churning"))

    def abandon(self) -> None:
        self.engine.abort_request(list(self.background))
        self.background.clear()
        deadline = time.monotonic() + 20
        while self.engine.has_unfinished_requests() and time.monotonic() < deadline:
            self.step()
        self.become_idle()

    def become_idle(self) -> None:
        """Take the steps behind the last request's end."""
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":  # a core of its own runs on by itself, and a step waits for it
            for _ in range(4):
                self.engine.step()

    def do_rest(self, _: Any) -> None:
        self.become_idle()
        self.pipe.send(("ok", "resting"))

    def do_clear(self, _: Any) -> None:
        self.churn_tokens = 0
        self.abandon()
        self.engine.reset_prefix_cache()
        self.pipe.send(("ok", "cleared"))

    def do_forget(self, _: Any) -> None:
        self.churn_tokens = 0
        self.abandon()
        if not self.engine.reset_prefix_cache(reset_connector=True):
            raise RuntimeError("vLLM did not empty its prefix cache")
        self.pipe.send(("ok", "forgotten"))
