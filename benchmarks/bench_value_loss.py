"""value_loss, forward and backward, of a minibatch."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import value_loss
from fastrl.ops.value_loss import value_loss_reference


def inputs(M: int, dtype: torch.dtype) -> Inputs:
    values, noise, returns = torch.randn(3, M, dtype=dtype)
    return {"values": values, "old_values": values + 0.2 * noise, "returns": returns,
            "loss_mask": torch.rand(M) > 0.2}


def forward_and_backward(op: Op, values: Tensor, **others: Any) -> tuple[Tensor, ...]:
    loss, _ = op(values, **others)
    return (loss.detach(), *torch.autograd.grad(loss, [values]))


CASES = [Case(
    op=value_loss, reference=value_loss_reference, inputs=inputs, run=forward_and_backward,
    gradients=("values",), cpu={"M": 64 * 1024}, gpu={"M": 64 * 1024}, small={"M": 77},
    bytes_moved=lambda M, dtype: (13 + 4) * M,
)]
