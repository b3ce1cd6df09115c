"""A small model's matrices stored by input, for the length of one call of the engine on a CPU.

A product with W [outputs, inputs] rearranges W in every call, which for the rows of a decode step
takes a fifth of the time; W stored as [inputs, outputs] is read as it lies. The copy is a second
one of the weights, so only small models get it, and it is dropped at the end of the call. Rows of
the LM head's copy would lie so far apart that every one is in another page of memory, so it is cut
into tiles.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastrl.models.causal_lm import CausalLM
from fastrl.models.heads import LMHead

MAX_COPY_BYTES = 2**28
"""Larger models are used as they are stored."""
TILE_UNIT, MIN_TILE = 16, 128
"""Columns of a tile are a multiple of one and at least the other."""
MAX_TILE, MAX_SHARED_TILE = 320, 3200
"""Most columns of a tile with one thread, and with several, which share every tile and wait for
each other after it (docs/log.md)."""


def matrices(model: CausalLM) -> list[nn.Linear | LMHead]:
    """Every module whose weight [outputs, inputs] rows are multiplied with, the LM head last."""
    return [*(module for module in model.modules() if isinstance(module, nn.Linear)),
            model.lm_head]


def is_small(model: CausalLM) -> bool:
    """True where a second copy of the matrices is taken for granted: MAX_COPY_BYTES, on a CPU."""
    weights = [module.weight for module in matrices(model)]
    num_bytes = sum(weight.numel() * weight.element_size() for weight in weights)
    return num_bytes <= MAX_COPY_BYTES and all(
        weight.device.type == "cpu" and weight.dtype == torch.float32 for weight in weights)


def by_input(weight: Tensor) -> Tensor:
    """A copy of weight [outputs, inputs], same shape, whose memory is [inputs, outputs]."""
    return weight.detach().t().contiguous().t()


def tile_columns(outputs: int) -> int:
    """Columns of the tiles that a matrix with so many is cut into; 0 where none divides them."""
    most = MAX_TILE if torch.get_num_threads() == 1 else MAX_SHARED_TILE
    return next((columns for columns in range(most, MIN_TILE - 1, -TILE_UNIT)
                 if outputs % columns == 0), 0)


def by_tile(weight: Tensor, columns: int) -> Tensor:
    """A copy [outputs / columns, inputs, columns] of weight [outputs, inputs]."""
    return weight.detach().view(-1, columns, weight.shape[1]).transpose(1, 2).contiguous()


def _copy(module: nn.Linear | LMHead) -> Tensor:
    columns = tile_columns(len(module.weight)) if isinstance(module, LMHead) else 0
    return by_tile(module.weight, columns) if columns else by_input(module.weight)


class WeightsByInput:
    """Copies of the weights of `modules`, as they are when this is made."""

    def __init__(self, modules: Sequence[nn.Linear | LMHead]) -> None:
        self._modules = modules
        self._own: list[nn.Parameter] = [module.weight for module in modules]  # type: ignore[misc]
        self._copies = [nn.Parameter(_copy(module), requires_grad=False) for module in modules]

    def renewed(self) -> "WeightsByInput":
        """Copies of what the weights are now."""
        return WeightsByInput(self._modules)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, the modules multiply with the copies."""
        self._put(self._copies)
        try:
            yield
        finally:
            self._put(self._own)

    def _put(self, weights: Sequence[nn.Parameter]) -> None:
        for module, weight in zip(self._modules, weights, strict=True):
            module.weight = weight
