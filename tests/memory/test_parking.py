"""Parked tensors: their memory is given back, and every bit of them returns."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastrl.errors import ConfigError
from fastrl.memory.parking import ParkingPlace
from fastrl.optim import AdamW

CPU = torch.device("cpu")
MIB = 2**20


def resident_bytes() -> int:
    """What the system says that this process has in memory."""
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("needs /proc")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def odd_tensors() -> list[torch.Tensor]:
    """All kinds of types and shapes, NaN with several payloads, nothing, a scalar."""
    patterns = torch.tensor([0x7FC00001, 0x7F800123, -0x3FFFFD, -0x80000000, 1, 0x7F800000],
                            dtype=torch.int64).to(torch.int32)
    return [patterns.view(torch.float32), torch.randn(7, 5).bfloat16(), torch.randn(3).double(),
            torch.zeros(0), torch.tensor(3), torch.randint(-128, 127, (1001,), dtype=torch.int8),
            torch.tensor([True, False, True])]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.clone().view(-1).view(torch.uint8).numpy().tobytes()  # numpy keeps the memory


@pytest.mark.parametrize("ahead", [False, True])
def test_every_bit_comes_back(tmp_path: Path, ahead: bool) -> None:
    tensors = odd_tensors()
    before = [bytes_of(tensor) for tensor in tensors]
    place = ParkingPlace("things", CPU, tmp_path)
    for _ in range(2):  # the second time into the same file
        place.park(tensors)
        assert place.is_parked and place.num_bytes == sum(map(len, before))
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        with ThreadPoolExecutor(1) as pool:
            if ahead:
                place.start_fetch(pool)
                assert place.is_fetching
            place.fetch()
        assert not place.is_parked and not place.is_fetching
        assert [bytes_of(tensor) for tensor in tensors] == before
        tensors[1].add_(1)  # what changes in between is not what the file had
        before[1] = bytes_of(tensors[1])
    assert list(tmp_path.iterdir()) == []  # the file has no name that could stay behind


def test_ties_views_gradients_and_references_stay() -> None:
    embedding = nn.Embedding(11, 4)
    head = nn.Linear(4, 11, bias=False)
    head.weight = embedding.weight
    row, columns = embedding.weight[3], embedding.weight.detach().t()
    embedding.weight.grad = torch.ones_like(embedding.weight)
    optimizer = AdamW(embedding.parameters())
    optimizer.step(0.1)
    place = ParkingPlace("model", CPU)
    tensors = [embedding.weight, head.weight, *optimizer.state_dict().values()]
    expected = [tensor.detach().clone() for tensor in tensors]
    place.park(tensors)
    # weight, two moments, the count of steps: what is shared is parked once
    assert place.num_bytes == 3 * 11 * 4 * 4 + 8
    assert torch.equal(embedding.weight.grad, torch.ones(11, 4))
    place.fetch()
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))
    embedding.weight.grad.fill_(-1)
    optimizer.step(0.1)
    assert head.weight is embedding.weight and torch.equal(row, embedding.weight[3])
    assert torch.equal(columns, embedding.weight.t()) and not torch.equal(row, expected[0][3])
    assert optimizer.num_steps == 2 and not torch.equal(tensors[2], expected[2])


@pytest.mark.parametrize("numel", [4 * MIB, 10_000], ids=["large", "many small"])
def test_memory_is_given_back(tmp_path: Path, numel: int) -> None:
    """Small tensors too, which the C library would keep."""
    tensors = [torch.randn(numel) for _ in range(16 * MIB // numel)]
    total = sum(tensor.nbytes for tensor in tensors)  # 64 MiB
    place = ParkingPlace("weights", CPU, tmp_path)
    place.park(tensors)  # returns what other tests have freed too
    place.fetch()
    with_them = resident_bytes()
    for _ in range(2):
        place.park(tensors)
        assert with_them - resident_bytes() > 0.8 * total
        place.fetch()
        assert abs(resident_bytes() - with_them) < 0.5 * total  # no second copy in the map


CUT_OFF_HEAP = """
import ctypes
import mmap
import sys
from pathlib import Path

import torch

from fastrl.memory.parking import ParkingPlace

PAGE, NO_REPLACE = mmap.PAGESIZE, 0x100000
libc = ctypes.CDLL(None)
libc.sbrk.restype = libc.mmap.restype = ctypes.c_void_p
libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: tensors lie in the heap
libc.mallopt(-1, 2**20)  # M_TRIM_THRESHOLD: as without the line above
end = -(-libc.sbrk(0) // PAGE) * PAGE
flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_REPLACE
assert libc.mmap(ctypes.c_void_p(end), PAGE, 0, flags, -1, ctypes.c_long(0)) == end


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


tensors = [torch.full((4 * 2**20,), float(number)) for number in range(4)]
place = ParkingPlace("weights", torch.device("cpu"), Path(sys.argv[1]))
place.park(tensors)
place.fetch()
with_them = resident_bytes()
place.park(tensors)
given_back = with_them - resident_bytes()
place.fetch()
assert [tensor.unique().tolist() for tensor in tensors] == [[0], [1], [2], [3]]
print(given_back)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's brk and GNU's C library")
def test_memory_is_given_back_from_a_heap_that_cannot_shrink(tmp_path: Path) -> None:
    """The last tensor of a heap, behind whose end another mapping lies, is not GNU's to return."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", CUT_OFF_HEAP, str(tmp_path)], env=env, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0.95 * 64 * MIB


def test_what_lies_between_parked_tensors_stays(tmp_path: Path) -> None:
    """Pieces of the C library's heap, whose first and last pages they share."""
    tensors = [torch.full((1500,), float(number)) for number in range(400)]
    place = ParkingPlace("every second", CPU, tmp_path)
    place.park(tensors[::2])
    assert [tensor.unique().tolist() for tensor in tensors[1::2]] == [[n] for n in range(1, 400, 2)]
    place.fetch()
    assert [tensor.unique().tolist() for tensor in tensors] == [[n] for n in range(400)]


def test_a_full_disk_is_an_error_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = torch.randn(1000)
    before = bytes_of(tensor)

    def refuse(*arguments: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = ParkingPlace("critic", CPU, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", refuse)
        with pytest.raises(ConfigError, match=f"disk for critic in {tmp_path}, got No space left"):
            place.park([tensor])
    assert bytes_of(tensor) == before and not place.is_parked
    place.park([tensor])
    place.fetch()
    assert bytes_of(tensor) == before


def test_the_size_of_the_disk_is_asked_for_before_anything_is_written() -> None:
    """/dev/full refuses as a full disk does, so a real file of too many bytes is not needed."""
    limit = pytest.importorskip("resource")
    tensor = torch.randn(100_000)
    soft, hard = limit.getrlimit(limit.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit.setrlimit(limit.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConfigError, match="expected 0 MiB of disk for it in .*File too large"):
            ParkingPlace("it", CPU).park([tensor])
    finally:
        limit.setrlimit(limit.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert tensor.untyped_storage().nbytes() == 400_000


def test_memory_of_others_is_refused() -> None:
    borrowed = torch.from_numpy(np.ones(3))
    own = torch.ones(2)
    with pytest.raises(ConfigError, match="expected reference to own its memory, got 24 bytes"):
        ParkingPlace("reference", CPU).park([own, borrowed])
    assert own.tolist() == [1, 1] and borrowed.tolist() == [1, 1, 1]


def test_constant_tensors_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(100), torch.randn(7)]
    before = [bytes_of(tensor) for tensor in tensors]
    place = ParkingPlace("reference", CPU, tmp_path, is_constant=True)
    place.park(tensors)
    place.fetch()
    monkeypatch.setattr(ParkingPlace, "_copy_out", None)
    place.park(tensors)
    place.fetch()
    assert [bytes_of(tensor) for tensor in tensors] == before
    monkeypatch.undo()
    other = torch.randn(100)  # another tensor is no longer what was written
    expected = bytes_of(other)
    place.park([other, tensors[1]])
    place.fetch()
    assert bytes_of(other) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    tensors = [tensor.cuda() for tensor in (torch.randn(1000, 1000), torch.randn(3).bfloat16())]
    before = [bytes_of(tensor.cpu()) for tensor in tensors]
    place = ParkingPlace("model", torch.device("cuda"))
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_allocated()
    for ahead in (False, True):
        place.park(tensors)
        assert allocated - torch.cuda.memory_allocated() >= 4_000_000
        with ThreadPoolExecutor(1) as pool:
            if ahead:
                place.start_fetch(pool)
            place.fetch()
        assert [bytes_of(tensor.cpu()) for tensor in tensors] == before
    place.close()
