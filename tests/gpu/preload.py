"""What the fork server imports once, so that each engine of a test starts in seconds. Nothing here touches a GPU."""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
import vllm.model_executor.models.llama
import vllm.v1.engine.core
import vllm.v1.engine.llm_engine  # noqa: F401
