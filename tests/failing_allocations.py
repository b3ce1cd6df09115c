"""Allocations that fail, from inside torch's own ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FailingAllocations(TorchDispatchMode):
    """Raises torch.OutOfMemoryError from inside the ops that take new memory, numbered from 0.

    Args:
        fails: Whether the allocation of a number does.
        last: Number of the last one that is looked at; later ones are not counted.
    """

    def __init__(self, fails: Callable[[int], bool], last: int | None = None) -> None:
        super().__init__()
        self.count = 0
        self._fails, self._last = fails, last

    @classmethod
    def at(cls, number: int) -> "FailingAllocations":
        """One allocation fails."""
        return cls(lambda n: n == number, number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._last is not None and self.count > self._last or not _may_take_memory(func):
            return out
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs or {}))
                 if isinstance(x, torch.Tensor)}
        if any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given
               for x in tree_leaves(out)):
            number, self.count = self.count, self.count + 1
            if self._fails(number):
                raise torch.OutOfMemoryError(f"allocation {number}, of {func}")
        return out


_KNOWN: dict[Any, bool] = {}


def _may_take_memory(func: Any) -> bool:
    """False where all that an op returns are its arguments or views of them, as it declares."""
    if func not in _KNOWN:
        _KNOWN[func] = any(value.alias_info is None for value in func._schema.returns)
    return _KNOWN[func]
