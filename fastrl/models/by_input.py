"""A small model's matrices stored by input, for the length of one call of the engine on a CPU.

A product with W [outputs, inputs] rearranges W in every call, which for the rows of a decode step
takes a fifth of the time; W stored as [inputs, outputs] is read as it lies. The copy is a second
one of the weights, so only small models get it, and it is dropped at the end of the call.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastrl.models.causal_lm import CausalLM
from fastrl.models.heads import LMHead

MAX_COPY_BYTES = 2**28
"""Larger models are used as they are stored."""


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


class WeightsByInput:
    """Copies of the weights of `modules`, as they are when this is made."""

    def __init__(self, modules: Sequence[nn.Linear | LMHead]) -> None:
        self._modules = modules
        self._own: list[nn.Parameter] = [module.weight for module in modules]  # type: ignore[misc]
        self._copies = [nn.Parameter(by_input(weight), requires_grad=False)
                        for weight in self._own]

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
