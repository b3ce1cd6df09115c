"""policy_loss, forward and backward, of a minibatch."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import policy_loss
from fastrl.ops.policy_loss import policy_loss_reference


def inputs(M: int, dtype: torch.dtype) -> Inputs:
    logprobs = -torch.rand(M, dtype=dtype)
    return {"logprobs": logprobs, "old_logprobs": logprobs + 0.2 * torch.randn(M, dtype=dtype),
            "advantages": torch.randn(M, dtype=dtype), "loss_mask": torch.rand(M) > 0.2}


def forward_and_backward(op: Op, logprobs: Tensor, **others: Any) -> tuple[Tensor, ...]:
    loss, _ = op(logprobs, **others)
    return (loss.detach(), *torch.autograd.grad(loss, [logprobs]))


CASES = [Case(
    op=policy_loss, reference=policy_loss_reference, inputs=inputs, run=forward_and_backward,
    gradients=("logprobs",), cpu={"M": 64 * 1024}, gpu={"M": 64 * 1024}, small={"M": 77},
    bytes_moved=lambda M, dtype: (13 + 4) * M,
)]
