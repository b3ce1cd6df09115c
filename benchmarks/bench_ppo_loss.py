"""ppo_loss, forward and backward, of a minibatch; advantages whitened on the way.

Beside it the same by three calls: whiten, policy_loss, value_loss.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import policy_loss, ppo_loss, value_loss, whiten
from fastrl.ops.ppo_loss import ppo_loss_reference


def inputs(M: int, dtype: torch.dtype) -> Inputs:
    logprobs, values = -torch.rand(M, dtype=dtype), torch.randn(M, dtype=dtype)
    return {"logprobs": logprobs, "old_logprobs": logprobs + 0.2 * torch.randn(M, dtype=dtype),
            "advantages": torch.randn(M, dtype=dtype), "values": values,
            "old_values": values + 0.2 * torch.randn(M, dtype=dtype),
            "returns": torch.randn(M, dtype=dtype), "loss_mask": torch.rand(M) > 0.2,
            "moments": torch.tensor([[M, 0.1 * M, 2.0 * M]], dtype=dtype)}


def apart(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, values: Tensor, old_values: Tensor,
    returns: Tensor, loss_mask: Tensor, moments: Tensor, backend: str,
) -> tuple[Tensor]:
    advantages = whiten(advantages, loss_mask, moments=moments, backend=backend)
    policy, _ = policy_loss(logprobs, old_logprobs, advantages, loss_mask, backend=backend)
    value, _ = value_loss(values, old_values, returns, loss_mask, backend=backend)
    return (policy + value,)


def forward_and_backward(op: Op, logprobs: Tensor, values: Tensor, **others: Any
                         ) -> tuple[Tensor, ...]:
    loss, *_ = op(logprobs=logprobs, values=values, **others)
    return (loss.detach(), *torch.autograd.grad(loss, [logprobs, values]))


CASES = [Case(
    op=ppo_loss, reference=ppo_loss_reference, inputs=inputs, run=forward_and_backward,
    gradients=("logprobs", "values"), cpu={"M": 64 * 1024}, gpu={"M": 64 * 1024}, small={"M": 77},
    bytes_moved=lambda M, dtype: (25 + 8) * M,
    others={"triton_apart": partial(apart, backend="triton")},
)]
