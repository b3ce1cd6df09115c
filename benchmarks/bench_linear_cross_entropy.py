"""linear_cross_entropy, forward and backward, beside linear_logprobs and losses of others."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import linear_cross_entropy, linear_logprobs
from fastrl.ops.linear_cross_entropy import linear_cross_entropy_reference


def inputs(M: int, D: int, V: int, dtype: torch.dtype) -> Inputs:
    return {"hidden": torch.randn(M, D, dtype=dtype),
            "weight": torch.randn(V, D, dtype=dtype) * D**-0.5,
            "token_ids": torch.randint(V, (M,))}


def recomputed(hidden: Tensor, weight: Tensor, token_ids: Tensor, *, denominator: float) -> Tensor:
    """The logits are made a second time for the gradient."""
    return -linear_logprobs(hidden, weight, token_ids)[0].sum() / denominator


def plain(hidden: Tensor, weight: Tensor, token_ids: Tensor, *, denominator: float) -> Tensor:
    """All logits in memory."""
    logits = (hidden @ weight.T).float()
    return torch.nn.functional.cross_entropy(logits, token_ids, reduction="sum") / denominator


def liger(hidden: Tensor, weight: Tensor, token_ids: Tensor, *, denominator: float) -> Tensor:
    """Liger-Kernel's, with the head's gradient added up in float32 as well."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden, weight, token_ids, reduction="sum", accum_dtype=torch.float32)
    return loss / denominator


def forward_and_backward(op: Op, hidden: Tensor, weight: Tensor, **others: Any
                         ) -> tuple[Tensor, ...]:
    loss = op(hidden, weight, **others, denominator=float(len(hidden)))
    return (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))


CASES = [Case(
    op=linear_cross_entropy, reference=linear_cross_entropy_reference, inputs=inputs,
    run=forward_and_backward, gradients=("hidden", "weight"),
    cpu={"M": 4096, "D": 288, "V": 32000}, gpu={"M": 8192, "D": 4096, "V": 151936},
    small={"M": 9, "D": 16, "V": 301}, compared={"M": 512}, gpu_dtype=torch.bfloat16,
    bytes_moved=lambda M, D, V, dtype: 2 * (M + V) * D * dtype.itemsize,
    flops=lambda M, D, V, dtype: 6 * M * D * V,
    others={"recomputed": recomputed, "plain": plain, "liger": liger},
)]
