"""Tensors that are parked and come back to the addresses that they had: captured graphs know them.

They lie in an arena from the first time that they come back on, each storage a part of it. At home
nothing but the storages holds the arena, so that it goes with the last tensor.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl.memory.arena import Arena, arena_of

ALIGNMENT = 512
"""Bytes that the place of a storage is a multiple of, as in PyTorch's allocator."""


class FixedAddresses:
    """The place that a group of tensors comes back to.

    While they are away they have shapes and an empty storage, as other parked tensors have: who
    asks a storage for its size finds none. Every tensor on a storage has to be listed; one that is
    not stays behind, with an empty storage or, from the second time on, with what others see.

    Args:
        device: Where the tensors live; see `fastrl.memory.arena.can_keep_addresses`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena: Arena | None = None
        self._storages: list[torch.UntypedStorage] = []
        """Parts of the arena, of the tensors that are away."""
        self._tensors: list[tuple[Tensor, int, int, torch.Size, tuple[int, ...]]] = []
        """Those that are away: tensor, number of its storage, offset, shape and strides."""

    def leave(
        self, tensors: Sequence[Tensor], storages: Sequence[torch.UntypedStorage]
    ) -> list[torch.UntypedStorage]:
        """Take the memory away from the tensors, whose bytes are copied already.

        Args:
            storages: The distinct ones behind the tensors, but for empty ones.
        Returns:
            The empty storages in their place.
        """
        self._arena = _whole_arena(storages)
        self._storages = [] if self._arena is None else list(storages)
        numbers = {storage._cdata: number for number, storage in enumerate(storages)}
        self._tensors = [
            (tensor, numbers[tensor.untyped_storage()._cdata], int(tensor.storage_offset()),
             tensor.shape, tensor.stride())
            for tensor in tensors if tensor.untyped_storage()._cdata in numbers]
        empty = [torch.empty(16, dtype=torch.uint8, device=self._device).untyped_storage()
                 for _ in storages]
        for tensor, number, _, shape, _ in self._tensors:
            _put(tensor, empty[number], 0, shape, (0,) * len(shape))
        for storage in (*empty, *storages):
            if arena_of(storage) is None:
                storage.resize_(0)
        if self._arena is not None:
            self._arena.unmap()
        return empty

    def come_back(self, sizes: Sequence[int]) -> list[torch.UntypedStorage]:
        """Memory of any content for the tensors that left; the storages that they have now.

        Args:
            sizes: Bytes of each storage, in the order of `leave`.
        Raises:
            torch.OutOfMemoryError: when there is not as much; then they are still away.
        """
        if self._arena is None:
            begins = [0]
            for size in sizes:
                begins.append(-(-(begins[-1] + size) // ALIGNMENT) * ALIGNMENT)
            arena = Arena(begins[-1], self._device)
            self._storages = [arena.storage(begin, size)
                              for begin, size in zip(begins[:-1], sizes, strict=True)]
            self._arena = arena
        self._arena.map()
        for tensor, number, offset, shape, stride in self._tensors:
            _put(tensor, self._storages[number], offset, shape, stride)
        storages, self._storages, self._tensors, self._arena = self._storages, [], [], None
        return storages


def _whole_arena(storages: Sequence[torch.UntypedStorage]) -> Arena | None:
    """The arena that consists of exactly these storages, whoever put them there."""
    arena = arena_of(storages[0])
    is_whole = arena is not None and len(storages) == arena.num_storages and all(
        arena_of(storage) is arena for storage in storages)
    return arena if is_whole else None


def _put(
    tensor: Tensor, storage: torch.UntypedStorage, offset: int, shape: torch.Size,
    stride: tuple[int, ...],
) -> None:
    """Let a tensor, which stays the same object, lie somewhere else."""
    with torch._C.DisableTorchFunctionSubclass():  # what is parked refuses it: fastrl.memory.guard
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            storage, offset, shape, stride)
