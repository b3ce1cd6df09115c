"""kl_estimate of a rollout, forward, and forward with backward."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import kl_estimate
from fastrl.ops.kl import kl_estimate_reference


def inputs(B: int, T: int, dtype: torch.dtype) -> Inputs:
    logprobs, ref_logprobs = -torch.rand(2, B, T, dtype=dtype)
    return {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "mask": torch.rand(B, T) > 0.2}


def forward_and_backward(op: Op, logprobs: Tensor, **others: Any) -> tuple[Tensor, ...]:
    estimates = op(logprobs, **others)
    return torch.autograd.grad(sum(x.sum() for x in estimates), [logprobs])


SIZES = {"cpu": {"B": 512, "T": 256}, "gpu": {"B": 512, "T": 1024}, "small": {"B": 3, "T": 37}}
CASES = [
    Case(op=kl_estimate, reference=kl_estimate_reference, inputs=inputs,
         run=lambda op, **given: op(**given), **SIZES,
         bytes_moved=lambda B, T, dtype: (9 + 12) * B * T),
    Case(op=kl_estimate, name="with backward", reference=kl_estimate_reference, inputs=inputs,
         run=forward_and_backward, gradients=("logprobs",), **SIZES,
         bytes_moved=lambda B, T, dtype: (9 + 4) * B * T),
]
