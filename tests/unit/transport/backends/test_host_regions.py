"""Host memory registered with CUDA, which is stood in for: these tests need no GPU."""

import ctypes
import importlib
import mmap
import os

import pytest

from tests.unit.transport.backends.simulated_gpu import SUCCESS, simulated
from transport.backends.shared_memory import open_region, region_of
from transport.errors import MemoryUnreachable

PAGE = mmap.PAGESIZE
SIZE = 10 * PAGE


@pytest.fixture
def region():
    fd = os.memfd_create("region")
    os.ftruncate(fd, SIZE)
    yield region_of(fd, SIZE)
    os.close(fd)


@pytest.fixture
def gpu(monkeypatch):
    with simulated(monkeypatch) as (made, cuda_ipc):
        made.regions = cuda_ipc.HostRegions()
        monkeypatch.setattr("transport.backends.host_regions.SEGMENT_BYTES", 4 * PAGE)
        yield made


def test_a_part_is_registered_in_segments_once_for_all_its_users_and_is_the_memory_of_others(gpu, region):
    address = gpu.regions.open(region, 0, SIZE)
    assert gpu.regions.open(region, 0, SIZE) == address
    assert sorted(gpu.pinned.values()) == [2 * PAGE, 4 * PAGE, 4 * PAGE]
    ctypes.memset(address + 3 * PAGE, 7, 1)
    fd = open_region(region)
    assert os.pread(fd, 1, 3 * PAGE) == b"\7"
    os.close(fd)
    gpu.regions.close(region, 0, SIZE)
    assert gpu.pinned
    gpu.regions.close(region, 0, SIZE)
    assert not gpu.pinned


def test_of_a_region_only_the_part_of_a_rank_is_registered_under_the_regions_own_address(gpu, region):
    whole, part = gpu.regions.open(region, 0, 2 * PAGE), gpu.regions.open(region, 5 * PAGE + 64, 7 * PAGE)
    assert sum(gpu.pinned.values()) == 4 * PAGE
    ctypes.memset(part + 6 * PAGE, 9, 1)
    assert ctypes.string_at(whole + 6 * PAGE, 1) == b"\t"


def test_what_can_not_be_registered_whole_is_let_go_of_and_says_how_far_it_came(gpu, region):
    gpu.refuses_after = 5 * PAGE
    with pytest.raises(MemoryUnreachable, match=r"cannot pin more than .* MiB of host memory \(cudaErrorMemoryAllocation\)"):
        gpu.regions.open(region, 0, SIZE)
    assert not gpu.pinned
    gpu.refuses_after = SIZE
    gpu.regions.open(region, 0, SIZE)


def test_segments_that_a_gpu_sees_apart_are_refused(gpu, region, monkeypatch):
    runtime = importlib.import_module("cuda.bindings").runtime

    def apart(begin, flags):
        return SUCCESS, begin + len(gpu.pinned) * PAGE

    monkeypatch.setattr(runtime, "cudaHostGetDevicePointer", apart)
    with pytest.raises(MemoryUnreachable, match="in pieces"):
        gpu.regions.open(region, 0, SIZE)
    assert not gpu.pinned


def test_an_engine_that_ends_does_not_wait_until_all_is_registered(gpu, region):
    gpu.regions.stop()
    with pytest.raises(MemoryUnreachable, match="the engine ends"):
        gpu.regions.open(region, 0, SIZE)
