"""Allocations that fail, from inside torch's own ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FailingAllocations(TorchDispatchMode):
    """Raises torch.OutOfMemoryError from inside the ops that take new memory, numbered from 0."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.count = 0
        self._fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs or {}))
                 if isinstance(x, torch.Tensor)}
        if any(isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given
               for x in tree_leaves(out)):
            number, self.count = self.count, self.count + 1
            if self._fails(number):
                raise torch.OutOfMemoryError(f"allocation {number}, of {func}")
        return out
