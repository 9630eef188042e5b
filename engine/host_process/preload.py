"""Inside a replica host: import vLLM once, and turn a fork of it into a vLLM server."""

import gc
import importlib
import importlib.util
import logging
import multiprocessing
import runpy
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("peerkv.host")

SERVER_MODULE = "vllm.entrypoints.launchers.api_server.entry"
FORMER_SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""Where older versions keep the server; 0.32 and 0.33 warn that it will go. Of `vllm serve`, which they recommend, the same
function is run in the end, but its command line needs a distribution named vllm, which a build for the CPU is not."""
PRELOAD_MODULES = (
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

    Raises ImportError if there is no vLLM; modules that this vLLM version lacks are skipped.
    """
    began = time.monotonic()
    importlib.import_module("vllm")
    for name in (server_module(), *PRELOAD_MODULES):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            log.warning("not preloaded: %s (%s)", name, error)
    gc.collect()
    gc.freeze()  # a fork's garbage collector must not touch, and thereby copy, our pages
    return time.monotonic() - began


def server_module() -> str:
    """Return the module of the installed vLLM that is run as its server, found without importing any of it."""
    vllm = importlib.util.find_spec("vllm")
    places = (vllm.submodule_search_locations or ()) if vllm is not None else ()
    file = Path(*SERVER_MODULE.split(".")[1:]).with_suffix(".py")
    return SERVER_MODULE if any((Path(place) / file).is_file() for place in places) else FORMER_SERVER_MODULE


def run_server(argv: Sequence[str]) -> None:
    """Act as `python -m` of the server's module with these arguments, in this process."""
    _fork_engine_core()
    module = server_module()
    sys.argv = [module, *argv]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*found in sys.modules.*", category=RuntimeWarning)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def _fork_engine_core() -> None:
    """Let vLLM fork its engine process.

    Its CPU platform sets the environment to "spawn", which imports all of vLLM again (20 s on two cores). A
    module attribute of vllm.envs goes before the environment. Safe as long as no torch operation has run.
    """
    import vllm.envs

    vllm.envs.VLLM_WORKER_MULTIPROC_METHOD = "fork"
    multiprocessing.set_start_method("fork", force=True)
