"""Addresses that are reserved once, and memory that lies behind them only while it is needed.

A captured CUDA graph has the addresses of the KV cache and of the weights in it. Other phases need
their memory, not their addresses: `unmap` gives the memory back and `map` puts other memory behind
the same addresses. On a GPU this is the driver's virtual memory management (csrc/arena.cpp); with n
GiB a switch takes 3n + 1 calls of the driver one way and n calls and one wait for the GPU the
other. On a CPU the system takes pages away (madvise) and gives pages of zeros at the next touch.
"""

import importlib.util
import math
import mmap
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastrl.errors import ConfigError


class Arena:
    """A range of bytes with or without memory behind it; without, when it is new.

    Args:
        num_bytes: Of the range.
        device: A CPU or a GPU.
    Raises:
        torch.OutOfMemoryError: when there are not as many addresses.
        ConfigError: when the size is not positive.
    """

    _live: ClassVar["weakref.WeakSet[Arena]"] = weakref.WeakSet()

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        if num_bytes < 1:
            raise ConfigError(f"arena: expected at least one byte, got {num_bytes}")
        self.num_bytes, self.device = num_bytes, device
        self.mapped_bytes = 0
        """Of the range, from its beginning on, that have memory."""
        self.num_storages = 0
        """Made by `storage` so far."""
        self._range = _range_on(num_bytes, device)
        self._finalizer = weakref.finalize(self, self._range.close)
        self._live.add(self)

    @property
    def is_mapped(self) -> bool:
        """There is memory behind the range, or behind its beginning."""
        return self.mapped_bytes > 0

    @property
    def keeps_addresses(self) -> bool:
        """Tensors stay where they are over `unmap` and `map`; else they have to be made again, and
        memory is free only once they are gone.
        """
        return not isinstance(self._range, _AllocatorRange)

    @property
    def is_zeroed(self) -> bool:
        """What `map` brings is zeros, so that no byte is ever part of a NaN by chance."""
        return not isinstance(self._range, _DriverRange)

    def tensor(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor over the range. Its content counts while the range is mapped.

        Args:
            offset: Byte where it begins, a multiple of the dtype's size.
        Raises:
            ConfigError: when it leaves the range or, where addresses are not kept, when nothing is
                mapped.
        """
        end = offset + math.prod(shape) * dtype.itemsize
        data = self._range.data
        limit = 0 if data is None else len(data)
        if offset < 0 or offset % dtype.itemsize or end > limit:
            raise ConfigError(f"arena: expected a tensor within {limit} bytes at a multiple of "
                              f"{dtype.itemsize}, got bytes {offset} to {end}; map the arena or "
                              "make it larger")
        assert data is not None
        return data[offset:end].view(dtype).view(*shape)

    def storage(self, offset: int, num_bytes: int) -> torch.UntypedStorage:
        """Bytes of the range as a storage of their own, which has no other tensor's bytes.

        The arena lives as long as the storage does (see `arena_of`). Only where addresses are kept.
        """
        storage = self._range.part(offset, num_bytes).untyped_storage()
        storage.arena = self  # type: ignore[attr-defined]
        self.num_storages += 1
        return storage

    def map(self, num_bytes: int | None = None) -> None:
        """Put memory behind the range, or behind its first `num_bytes`; nothing if it is mapped.

        Raises:
            torch.OutOfMemoryError: when there is not as much; then nothing is mapped.
        """
        if not self.is_mapped:
            num_bytes = self.num_bytes if num_bytes is None else num_bytes
            self._range.map(num_bytes)
            self.mapped_bytes = num_bytes

    def unmap(self) -> None:
        """Give the memory back once the device is done with it; the content is lost."""
        if self.is_mapped:
            self._range.unmap()
            self.mapped_bytes = 0

    def close(self) -> None:
        """Give back memory and addresses; no tensor of the arena may be used any more."""
        self.unmap()
        self._finalizer()


class _Range(Protocol):
    """How a device does it. `data` is the range as bytes, where it has an address."""

    data: Tensor | None

    def part(self, offset: int, num_bytes: int) -> Tensor: ...
    def map(self, num_bytes: int) -> None: ...
    def unmap(self) -> None: ...
    def close(self) -> None: ...


def arena_of(storage: torch.UntypedStorage) -> Arena | None:
    """The arena whose `storage` made this one; None: it lies elsewhere."""
    return getattr(storage, "arena", None)


def can_keep_addresses(device: torch.device) -> bool:
    """Whether an arena on a device keeps its addresses: on a CPU, and on a GPU with virtual memory
    management and the extension.
    """
    return device.type == "cpu" or (
        device.type == "cuda" and importlib.util.find_spec("fastrl_kernels._C") is not None
        and _DriverRange.granularity(device) > 0)


def mapped_bytes(device: torch.device) -> int:
    """Memory of a device that arenas hold now and PyTorch's allocator knows nothing of."""
    return sum(arena.mapped_bytes for arena in Arena._live
               if arena.device.type == device.type and arena.keeps_addresses)


def gpu_peak_bytes(device: torch.device | str) -> int:
    """Most memory of a GPU since its peak was begun anew: that of PyTorch's allocator, and what
    arenas hold now, which change only between phases.
    """
    return torch.cuda.max_memory_allocated(device) + mapped_bytes(torch.device(device))


def _range_on(num_bytes: int, device: torch.device) -> _Range:
    if device.type == "cpu":
        return _HostRange(num_bytes)
    if can_keep_addresses(device):
        return _DriverRange(num_bytes, device, _DriverRange.granularity(device))
    return _AllocatorRange(device)


class _HostRange:
    """Anonymous memory of the process: the system gives pages of zeros as they are touched."""

    def __init__(self, num_bytes: int) -> None:
        try:
            self._map: mmap.mmap | None = mmap.mmap(
                -1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError) as error:
            raise torch.OutOfMemoryError(f"arena: the system has no {num_bytes} bytes: {error}") \
                from error
        self.data: Tensor | None = torch.frombuffer(self._map, dtype=torch.uint8)

    def part(self, offset: int, num_bytes: int) -> Tensor:
        assert self._map is not None
        return torch.frombuffer(self._map, dtype=torch.uint8, count=num_bytes, offset=offset)

    def map(self, num_bytes: int) -> None:
        """Pages come when they are touched."""

    def unmap(self) -> None:
        assert self._map is not None
        self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._map = self.data = None  # gone with the last tensor


class _DriverRange:
    """Virtual memory of a GPU."""

    def __init__(self, num_bytes: int, device: torch.device, granularity: int) -> None:
        self._device, self._granularity = device, granularity
        self._size, self._mapped = _round_up(num_bytes, granularity), 0
        with torch.cuda.device(device):
            self._index = torch.cuda.current_device()
            self._address = int(_driver("arena_reserve", self._size))
            self.data: Tensor | None = _driver("arena_bytes", self._address, self._size,
                                               self._index)

    @staticmethod
    def granularity(device: torch.device) -> int:
        """What sizes are multiples of; 0 where the GPU cannot do it."""
        torch.cuda.init()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):
            return int(_driver("arena_granularity", torch.cuda.current_device()))

    def part(self, offset: int, num_bytes: int) -> Tensor:
        part: Tensor = _driver("arena_bytes", self._address + offset, num_bytes, self._index)
        return part

    def map(self, num_bytes: int) -> None:
        size = _round_up(num_bytes, self._granularity)
        with torch.cuda.device(self._device):
            try:
                _driver("arena_map", self._address, size, self._index)
            except torch.OutOfMemoryError:  # torch may hold memory that nobody uses
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
                _driver("arena_map", self._address, size, self._index)
        self._mapped = size

    def unmap(self) -> None:
        if self._mapped:
            torch.cuda.synchronize(self._device)
            _driver("arena_unmap", self._address, self._mapped)
            self._mapped = 0

    def close(self) -> None:
        self.unmap()
        self.data = None
        _driver("arena_free", self._address, self._size)


class _AllocatorRange:
    """Torch's own memory, at another address after every `map`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.data: Tensor | None = None

    def part(self, offset: int, num_bytes: int) -> Tensor:
        raise AssertionError("a storage whose address is not kept")

    def map(self, num_bytes: int) -> None:
        self.data = torch.zeros(num_bytes, dtype=torch.uint8, device=self._device)

    def unmap(self) -> None:
        self.data = None

    def close(self) -> None:
        self.data = None


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _driver(name: str, *arguments: int) -> Any:
    """A call of csrc/arena.cpp; the driver's out-of-memory as torch's."""
    from fastrl_kernels.cuda import compiled_ops

    try:
        return getattr(compiled_ops(), name)(*arguments)
    except RuntimeError as error:
        if "CUDA_ERROR_OUT_OF_MEMORY" in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        raise
