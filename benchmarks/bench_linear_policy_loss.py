"""linear_policy_loss, forward and backward, beside autograd with all logits and with chunks.

On a CPU the size is the one at which the extra memory has to be at most a fifth of the plain
way's, and the time no longer: benchmarks/results/linear_policy_loss_cpu_*.json.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import linear_policy_loss
from fastrl.ops.linear_policy_loss import linear_policy_loss_reference
from fastrl.ops.policy_loss import PolicyStats, policy_loss_reference


def inputs(M: int, D: int, V: int, dtype: torch.dtype) -> Inputs:
    # Old log-probs near the new ones of such weights, so that some ratios are clipped.
    return {"hidden": torch.randn(M, D, dtype=dtype),
            "weight": torch.randn(V, D, dtype=dtype) * D**-0.5,
            "token_ids": torch.randint(V, (M,)),
            "old_logprobs": -torch.full((M,), float(V)).log() - 0.5 + torch.randn(M),
            "advantages": torch.randn(M), "loss_mask": torch.rand(M) > 0.1}


def plain(hidden: Tensor, weight: Tensor, token_ids: Tensor, old_logprobs: Tensor,
          advantages: Tensor, loss_mask: Tensor, *, denominator: float
          ) -> tuple[Tensor, PolicyStats]:
    """What a trainer without the op writes: log_softmax, gather, autograd."""
    all_logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    logprobs = all_logprobs.gather(1, token_ids[:, None]).squeeze(1)
    return policy_loss_reference(logprobs, old_logprobs, advantages, loss_mask,
                                 denominator=denominator)


def chunked(hidden: Tensor, weight: Tensor, token_ids: Tensor, old_logprobs: Tensor,
            advantages: Tensor, loss_mask: Tensor, *, denominator: float
            ) -> tuple[Tensor, PolicyStats]:
    """As TRL and verl save memory: 512 tokens at a time, whose logits the backward pass remakes."""
    def logprobs_of(hidden: Tensor, token_ids: Tensor) -> Tensor:
        all_logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
        return all_logprobs.gather(1, token_ids[:, None]).squeeze(1)

    parts = zip(hidden.split(512), token_ids.split(512), strict=True)
    logprobs = torch.cat([checkpoint(logprobs_of, *part, use_reentrant=False) for part in parts])
    return policy_loss_reference(logprobs, old_logprobs, advantages, loss_mask,
                                 denominator=denominator)


def forward_and_backward(op: Op, hidden: Tensor, weight: Tensor, **others: Any
                         ) -> tuple[Tensor, ...]:
    loss, _ = op(hidden, weight, **others, denominator=float(len(hidden)))
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


CASES = [Case(
    op=linear_policy_loss, reference=linear_policy_loss_reference, inputs=inputs,
    run=forward_and_backward, gradients=("hidden", "weight"),
    cpu={"M": 4096, "D": 288, "V": 32000}, gpu={"M": 8192, "D": 4096, "V": 151936},
    small={"M": 9, "D": 16, "V": 301}, compared={"M": 512}, gpu_dtype=torch.bfloat16,
    bytes_moved=lambda M, D, V, dtype: 2 * (M + V) * D * dtype.itemsize,
    flops=lambda M, D, V, dtype: 6 * M * D * V,
    others={"plain": plain, "chunked": chunked},
)]
