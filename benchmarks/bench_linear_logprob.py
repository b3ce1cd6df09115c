"""linear_logprobs, forward and backward, beside the same with all logits in memory."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import linear_logprobs
from fastrl.ops.linear_logprob import linear_logprobs_reference


def inputs(M: int, D: int, V: int, dtype: torch.dtype) -> Inputs:
    return {"hidden": torch.randn(M, D, dtype=dtype),
            "weight": torch.randn(V, D, dtype=dtype) * D**-0.5,
            "token_ids": torch.randint(V, (M,))}


def forward_and_backward(op: Op, hidden: Tensor, weight: Tensor, token_ids: Tensor
                         ) -> tuple[Tensor, ...]:
    logprobs, entropy = op(hidden, weight, token_ids)
    gradients = torch.autograd.grad(-logprobs.mean(), (hidden, weight))
    return (logprobs.detach(), entropy.detach(), *gradients)


CASES = [
    Case(op=linear_logprobs, name="forward", reference=linear_logprobs_reference, inputs=inputs,
         run=lambda op, **given: op(**given),
         cpu={"M": 1024, "D": 288, "V": 32000}, gpu={"M": 8192, "D": 4096, "V": 151936},
         small={"M": 9, "D": 16, "V": 301}, compared={"M": 512}, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda M, D, V, dtype: (M + V) * D * dtype.itemsize,
         flops=lambda M, D, V, dtype: 2 * M * D * V,
         others={"stored_logits": linear_logprobs_reference,
                 "triton_no_logits": partial(linear_logprobs, backend="triton", logits="none")}),
    Case(op=linear_logprobs, name="with backward", reference=linear_logprobs_reference,
         inputs=inputs, run=forward_and_backward, gradients=("hidden", "weight"),
         cpu={"M": 1024, "D": 288, "V": 32000}, gpu={"M": 8192, "D": 4096, "V": 151936},
         small={"M": 9, "D": 16, "V": 301}, compared={"M": 512}, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda M, D, V, dtype: 2 * (M + V) * D * dtype.itemsize,
         flops=lambda M, D, V, dtype: 6 * M * D * V,
         others={"stored_logits": linear_logprobs_reference}),
]
