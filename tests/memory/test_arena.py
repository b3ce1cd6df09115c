"""Addresses that stay, memory that goes."""

import gc
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastrl.errors import ConfigError
from fastrl.memory.arena import Arena, _AllocatorRange

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
MIB = 2**20


def _resident_bytes() -> int:
    """Of this process, in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_goes_and_the_address_stays() -> None:
    arena = Arena(64 * MIB, CPU)
    arena.map()
    tensor = arena.tensor(0, (16, MIB), torch.float32)
    address, before = tensor.data_ptr(), _resident_bytes()
    tensor.fill_(1.0)
    assert _resident_bytes() - before > 60 * MIB
    arena.unmap()
    assert not arena.is_mapped and _resident_bytes() - before < 4 * MIB
    arena.map()
    assert arena.is_mapped and arena.keeps_addresses and arena.is_zeroed
    assert tensor.data_ptr() == address and float(tensor.sum()) == 0.0  # any() takes memory
    assert arena.tensor(0, (16, MIB), torch.float32).data_ptr() == address
    tensor.fill_(1.0)
    arena.close()
    assert _resident_bytes() - before < 4 * MIB


def test_an_arena_that_nobody_has_any_more_gives_its_memory_back() -> None:
    before = _resident_bytes()
    arena = Arena(64 * MIB, CPU)
    arena.map()
    arena.tensor(0, (16, MIB), torch.float32).fill_(1.0)
    del arena
    gc.collect()
    assert _resident_bytes() - before < 4 * MIB


def test_tensors_lie_where_they_are_asked_for() -> None:
    arena = Arena(4096, CPU)
    arena.map()
    whole = arena.tensor(0, (4096,), torch.uint8)
    part = arena.tensor(64, (2, 3), torch.bfloat16)
    part.fill_(1.0)
    assert part.data_ptr() - whole.data_ptr() == 64 and part.is_contiguous()
    assert whole.nonzero().min() >= 64 and whole.nonzero().max() < 64 + 12


@pytest.mark.parametrize("offset, shape", [(-4, (1,)), (2, (1,)), (4096, (1,)), (0, (1025,))])
def test_a_tensor_outside_is_refused(offset: int, shape: tuple[int, ...]) -> None:
    arena = Arena(4096, CPU)
    with pytest.raises(ConfigError, match="arena: expected a tensor within 4096 bytes"):
        arena.tensor(offset, shape, torch.float32)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least one byte, got 0"):
        Arena(0, CPU)
    for num_bytes in (2**60, 2**80):
        with pytest.raises(torch.OutOfMemoryError, match=f"the system has no {num_bytes} bytes"):
            Arena(num_bytes, CPU)


def test_a_device_without_virtual_memory_has_the_same_interface() -> None:
    """Its tensors have to be made again; the CPU stands in for such a GPU."""
    arena = Arena(4096, CPU)
    arena._range = _AllocatorRange(CPU)
    assert not arena.keeps_addresses
    with pytest.raises(ConfigError, match="within 0 bytes .*; map the arena"):
        arena.tensor(0, (4,), torch.float32)
    arena.map()
    arena.tensor(0, (4,), torch.float32).fill_(1.0)
    arena.unmap()
    arena.map(1024)
    assert not arena.tensor(0, (256,), torch.float32).any()
    with pytest.raises(ConfigError, match="within 1024 bytes"):
        arena.tensor(0, (257,), torch.float32)


@pytest.fixture(scope="module")
def driver_test(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """csrc/arena.cpp with a main and, in the driver's place, a library that notes its calls."""
    import triton

    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    folder = tmp_path_factory.mktemp("driver")
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    flags = [compiler, "-std=c++20", "-Wall", "-Wextra", "-Werror", "-isystem", str(include),
             f"-I{ROOT / 'csrc'}"]
    here = ROOT / "tests/memory"
    subprocess.run([*flags, "-shared", "-fPIC", str(here / "driver_stand_in.cpp"), "-o",
                    str(folder / "libcuda.so.1")], check=True)
    subprocess.run([*flags, str(here / "arena_calls.cpp"), str(ROOT / "csrc/arena.cpp"), "-ldl",
                    "-o", str(folder / "arena_calls")], check=True)
    return folder


def _calls(folder: Path, num_gib: int, failing: str = "", library: Path | None = None) -> list[str]:
    """What arena_calls prints: the driver's calls and the arena's answers, in order."""
    path = str(folder if library is None else library)
    done = subprocess.run([str(folder / "arena_calls"), str(num_gib)], capture_output=True,
                          text=True, env={"LD_LIBRARY_PATH": path, "FAILING": failing})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_switch_takes_few_calls_of_the_driver(driver_test: Path) -> None:
    lines = _calls(driver_test, 5)
    mapping = lines[lines.index("map") + 1 : lines.index("mapped")]
    piece = ["cuMemCreate 1024", "cuMemMap 1024", "cuMemRelease"]
    assert mapping == piece * 5 + ["cuMemSetAccess 5120"]
    unmapping = lines[lines.index("unmap") + 1 : lines.index("unmapped")]
    assert unmapping == ["cuMemUnmap 1024"] * 5
    assert lines[-2:] == ["cuMemAddressFree 5120", "left 0"]


@pytest.mark.parametrize("failing, num_mapped", [
    ("cuMemCreate 1", 0), ("cuMemCreate 3", 2), ("cuMemMap 2", 1), ("cuMemSetAccess 1", 5)])
def test_a_driver_that_refuses_leaves_nothing_mapped(
    driver_test: Path, failing: str, num_mapped: int
) -> None:
    lines = _calls(driver_test, 5, failing)
    name = failing.split()[0]
    (error,) = [line for line in lines if line.startswith("error")]
    size = 5120 if name == "cuMemSetAccess" else 1024
    assert f"arena: {name} of {size * MIB} bytes: CUDA_ERROR_OUT_OF_MEMORY (no memory); " in error
    assert lines.count("cuMemUnmap 1024") == num_mapped
    assert lines[-1] == "left 0"


def test_a_machine_without_a_driver_says_so(driver_test: Path, tmp_path: Path) -> None:
    lines = _calls(driver_test, 1, library=tmp_path)
    if not lines[0].startswith("error"):
        pytest.skip("this machine has a driver")
    assert "expected the CUDA driver's library libcuda.so.1" in lines[0]
    assert "install the NVIDIA driver" in lines[0]


@pytest.mark.gpu
def test_on_a_gpu_memory_goes_and_the_address_stays() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    device = torch.device("cuda")
    arena = Arena(256 * MIB, device)
    if not arena.keeps_addresses:
        pytest.skip("needs the extension and virtual memory management")
    free = torch.cuda.mem_get_info()[0]
    arena.map()
    tensor = arena.tensor(0, (64, MIB), torch.float32)
    address = tensor.data_ptr()
    tensor.fill_(2.0)
    assert float(tensor.sum()) == 2.0 * 64 * MIB
    assert free - torch.cuda.mem_get_info()[0] >= 256 * MIB
    arena.unmap()
    assert free - torch.cuda.mem_get_info()[0] < 16 * MIB
    arena.map(64 * MIB)
    tensor[0].fill_(3.0)
    assert tensor.data_ptr() == address and float(tensor[0].sum()) == 3.0 * MIB
    arena.close()
    with pytest.raises(torch.OutOfMemoryError, match="cuMemCreate .* CUDA_ERROR_OUT_OF_MEMORY"):
        Arena(2 * torch.cuda.mem_get_info()[1], device).map()
    assert free - torch.cuda.mem_get_info()[0] < 16 * MIB
