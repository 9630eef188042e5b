"""A GPU for tests without one: streams that run in any order that their events allow, kernels run by Triton's interpreter.

Whatever is enqueued runs only when the test lets it: `Gpu.some` runs a few steps of streams chosen by chance, a synchronise
what it must. So a wait that is missing shows as wrong bytes. Addresses are the process' own, IPC handles are addresses.
"""

import contextlib
import importlib
import random
import sys
import threading
import time
import types
from collections import deque
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime import JITFunction


class Gpu:
    """One device's streams. `compute` is the engine's; a test with several engines sets it to that of the one that runs."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.streams: list[Stream] = []
        self.compute = Stream(self)
        self._entered = threading.local()
        self.running = threading.RLock()
        self.pinned: dict[int, int] = {}
        self.refuses_after = 1 << 62
        """Bytes that can be pinned."""

    @property
    def current(self) -> "Stream":
        """What this thread enqueues on."""
        return getattr(self._entered, "stream", None) or self.compute

    @contextlib.contextmanager
    def entered(self, stream: "Stream") -> Any:
        former = getattr(self._entered, "stream", None)
        self._entered.stream = stream
        try:
            yield
        finally:
            self._entered.stream = former

    def one(self) -> bool:
        """Run a step of any stream; False if there is none. One at a time: the pinner's thread synchronises too."""
        with self.running:
            ready = [stream for stream in self.streams if stream.runnable()]
            if ready:
                self.rng.choice(ready).run_one()
            return bool(ready)

    def some(self, most: int = 4) -> None:
        for _ in range(self.rng.randrange(most + 1)):
            if not self.one():
                return

    def all(self) -> None:
        while self.one():
            pass
        assert not any(stream.queue for stream in self.streams), "streams wait for each other"


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.queue: deque[tuple[str, Any, int]] = deque()
        gpu.streams.append(self)

    def runnable(self) -> bool:
        return bool(self.queue) and (self.queue[0][0] != "wait" or self.queue[0][1].done >= self.queue[0][2])

    def run_one(self) -> None:
        kind, what, number = self.queue.popleft()
        if kind == "run":
            what()
        elif kind == "record":
            what.done = number

    def enqueue(self, what: Any) -> None:
        self.queue.append(("run", what, 0))

    def wait_event(self, event: "Event") -> None:
        self.queue.append(("wait", event, event.recorded))

    def wait_stream(self, other: "Stream") -> None:
        event = Event()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        while self.queue:
            if not self.gpu.one():  # what another thread runs now, or is about to enqueue
                time.sleep(0.001)
        with self.gpu.running:  # until what another thread runs is done
            pass


class Event:
    gpu: Gpu

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded = self.done = 0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded += 1
        (stream or self.gpu.current).queue.append(("record", self, self.recorded))

    def query(self) -> bool:
        return self.done == self.recorded

    def elapsed_time(self, other: "Event") -> float:
        assert self.query()
        assert other.query()
        return 1.0


class _Status:
    def __init__(self, name: str) -> None:
        self.name = name


class _Handle:
    def __init__(self) -> None:
        self.reserved = bytes(64)


SUCCESS, NO_MEMORY = _Status("cudaSuccess"), _Status("cudaErrorMemoryAllocation")


def _bindings(gpu: Gpu) -> Any:
    def export(base: int) -> Any:
        handle = _Handle()
        handle.reserved = base.to_bytes(64, "little")
        return SUCCESS, handle

    def register(begin: int, size: int, flags: int) -> Any:
        assert not any(begin < other + length and other < begin + size for other, length in gpu.pinned.items())
        if sum(gpu.pinned.values()) + size > gpu.refuses_after:
            return (NO_MEMORY,)
        gpu.pinned[begin] = size
        return (SUCCESS,)

    def unregister(begin: int) -> Any:
        del gpu.pinned[begin]
        return (SUCCESS,)

    runtime = types.SimpleNamespace(
        cudaError_t=types.SimpleNamespace(cudaSuccess=SUCCESS),
        cudaIpcMemHandle_t=_Handle,
        cudaIpcMemLazyEnablePeerAccess=1,
        cudaIpcGetMemHandle=export,
        cudaIpcOpenMemHandle=lambda handle, flags: (SUCCESS, int.from_bytes(handle.reserved, "little")),
        cudaIpcCloseMemHandle=lambda address: (SUCCESS,),
        cudaHostRegister=register,
        cudaHostUnregister=unregister,
        cudaHostGetDevicePointer=lambda begin, flags: (SUCCESS, begin),
        cudaHostRegisterPortable=1,
        cudaHostRegisterMapped=2,
        cudaGetLastError=lambda: (SUCCESS,),
        cudaStreamCaptureMode=types.SimpleNamespace(cudaStreamCaptureModeRelaxed=2),
        cudaThreadExchangeStreamCaptureMode=lambda mode: (SUCCESS, 0),
    )
    driver = types.SimpleNamespace(
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=SUCCESS), cuMemGetAddressRange=lambda address: (SUCCESS, address, 1 << 40)
    )
    return types.SimpleNamespace(driver=driver, runtime=runtime)


def _enqueued(gpu: Gpu, kernel: Any) -> Any:
    return lambda *given: gpu.current.enqueue(lambda: kernel(*given))


MODULES = ("cuda_ipc", "coding", "coding_int8", "coding_rotated", "coding_rows", "gather", "host_regions")
WRITER = "engine.tiers.cuda_slot_writer"


@contextlib.contextmanager
def simulated(monkeypatch: Any, seed: int = 0) -> Any:
    """Yield a Gpu and the module `transport.backends.cuda_ipc`, which takes tensors of the CPU for the device's."""
    gpu = Gpu(seed)
    bindings = _bindings(gpu)
    for name, module in (("cuda", types.SimpleNamespace(bindings=bindings)), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    names = [f"transport.backends.{name}" for name in MODULES] + [WRITER]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(Event, "gpu", gpu, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(gpu))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", gpu.entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.compute)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for name in ("max", "sum"):
        if isinstance(getattr(tl, name), JITFunction):  # Triton was imported before this
            monkeypatch.setattr(tl, name, triton.jit(getattr(tl, name).fn))
    try:
        cuda_ipc = importlib.import_module("transport.backends.cuda_ipc")
        for name in ("gather", "encode", "decode"):
            monkeypatch.setattr(cuda_ipc, name, _enqueued(gpu, getattr(cuda_ipc, name)))
        yield gpu, cuda_ipc
    finally:
        for name in names:
            sys.modules.pop(name, None)
