"""Inside a replica host: import vLLM once, and turn a fork of it into a vLLM server."""

import gc
import importlib
import logging
import multiprocessing
import runpy
import sys
import time
import warnings
from collections.abc import Sequence

log = logging.getLogger("peerkv.host")

VLLM_SERVER_MODULE = "vllm.entrypoints.openai.api_server"
PRELOAD_MODULES = (
    VLLM_SERVER_MODULE,
    "vllm.entrypoints.launchers.api_server.entry",  # where 0.32 keeps the server
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader",
    "vllm.tokenizers",
    "torch._dynamo",
    "torch._inductor",
    "engine.connector.peerkv_connector",
)


def preload() -> float:
    """Import what replicas need and return the seconds it took. Runs no torch operation, starts no thread.

    Raises ImportError when there is no vLLM; a module that this vLLM version lacks is imported by nobody.
    """
    began = time.monotonic()
    importlib.import_module("vllm")
    for name in PRELOAD_MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            log.warning("not preloaded: %s (%s)", name, error)
    gc.collect()
    gc.freeze()  # the collector of a fork must not touch, and so copy, our pages
    return time.monotonic() - began


def run_server(argv: Sequence[str]) -> None:
    """Be `python -m vllm.entrypoints.openai.api_server` with these arguments, in this process."""
    _fork_engine_core()
    sys.argv = [VLLM_SERVER_MODULE, *argv]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
        runpy.run_module(VLLM_SERVER_MODULE, run_name="__main__", alter_sys=True)


def _fork_engine_core() -> None:
    """Let vLLM fork its engine process.

    Its CPU platform sets the environment to "spawn", which imports all of vLLM again (20 s on two cores). A
    module attribute of vllm.envs goes before the environment. Safe as long as no torch operation has run.
    """
    import vllm.envs

    vllm.envs.VLLM_WORKER_MULTIPROC_METHOD = "fork"
    multiprocessing.set_start_method("fork", force=True)
