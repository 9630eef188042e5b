"""What CUDA refuses becomes a reason that says what to change. CUDA is stood in for: these tests need no GPU."""

import importlib
import sys
import types

import pytest


class Status:
    """One of CUDA's results."""

    def __init__(self, name):
        self.name = name


SUCCESS, REFUSED = Status("SUCCESS"), Status("cudaErrorInvalidValue")


class Handle:
    reserved = b"\0" * 64


@pytest.fixture
def cuda_ipc(monkeypatch):
    runtime = types.SimpleNamespace(
        cudaError_t=types.SimpleNamespace(cudaSuccess=SUCCESS),
        cudaIpcMemHandle_t=Handle,
        cudaIpcMemLazyEnablePeerAccess=1,
        cudaIpcGetMemHandle=lambda base: (REFUSED, None),
        cudaIpcOpenMemHandle=lambda handle, flags: (REFUSED, None),
    )
    driver = types.SimpleNamespace(
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=SUCCESS), cuMemGetAddressRange=lambda address: (REFUSED, 0, 0)
    )
    bindings = types.SimpleNamespace(driver=driver, runtime=runtime)
    for name, module in (("cuda", types.SimpleNamespace(bindings=bindings)), ("cuda.bindings", bindings)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "transport.backends.cuda_ipc", raising=False)
    yield importlib.import_module("transport.backends.cuda_ipc")
    sys.modules.pop("transport.backends.cuda_ipc", None)


def test_memory_that_can_not_be_exported_says_which_settings_of_vllm_to_change(cuda_ipc):
    with pytest.raises(cuda_ipc.MemoryUnreachable, match=r"without expandable_segments .* and without sleep mode"):
        cuda_ipc._export(4096)


def test_memory_that_is_no_plain_allocation_is_refused_with_its_address(cuda_ipc):
    with pytest.raises(cuda_ipc.MemoryUnreachable, match="0x1000 is not a plain CUDA allocation: cudaErrorInvalidValue"):
        cuda_ipc._allocation(4096)


def test_a_peer_that_can_not_be_opened_says_what_it_takes(cuda_ipc):
    with pytest.raises(
        cuda_ipc.MemoryUnreachable, match=r"peer access .* one host and, in containers, one IPC and PID namespace"
    ):
        cuda_ipc._import("00" * 64)
    with pytest.raises(cuda_ipc.MemoryUnreachable, match="another length"):
        cuda_ipc._import("00" * 8)
