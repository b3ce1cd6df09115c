"""linear_kl, forward, and forward with backward, beside the same with all logits in memory."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import linear_kl
from fastrl.ops.linear_kl import linear_kl_reference


def inputs(M: int, D: int, V: int, dtype: torch.dtype) -> Inputs:
    hidden, weight = torch.randn(M, D, dtype=dtype), torch.randn(V, D, dtype=dtype) * D**-0.5
    return {"hidden": hidden, "weight": weight,  # a reference near the policy, as in training
            "ref_hidden": hidden + 0.1 * torch.randn_like(hidden), "ref_weight": weight.clone()}


def forward_and_backward(op: Op, hidden: Tensor, weight: Tensor, **others: Any
                         ) -> tuple[Tensor, ...]:
    kl = op(hidden, weight, **others)
    return (kl.detach(), *torch.autograd.grad(kl.mean(), (hidden, weight)))


SIZES: dict[str, Any] = {
    "cpu": {"M": 512, "D": 288, "V": 32000}, "gpu": {"M": 8192, "D": 4096, "V": 151936},
    "small": {"M": 9, "D": 16, "V": 301}, "compared": {"M": 256}, "gpu_dtype": torch.bfloat16}
CASES = [
    Case(op=linear_kl, name="forward", reference=linear_kl_reference, inputs=inputs,
         run=lambda op, **given: op(**given), **SIZES,
         bytes_moved=lambda M, D, V, dtype: 2 * (M + V) * D * dtype.itemsize,
         flops=lambda M, D, V, dtype: 4 * M * D * V, others={"stored_logits": linear_kl_reference}),
    Case(op=linear_kl, name="with backward", reference=linear_kl_reference, inputs=inputs,
         run=forward_and_backward, gradients=("hidden", "weight"), **SIZES,
         bytes_moved=lambda M, D, V, dtype: 3 * (M + V) * D * dtype.itemsize,
         flops=lambda M, D, V, dtype: 8 * M * D * V, others={"stored_logits": linear_kl_reference}),
]
