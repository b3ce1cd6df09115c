"""gather_logprobs of stored logits, forward, and forward with backward."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import gather_logprobs
from fastrl.ops.logprob import gather_logprobs_reference


def inputs(M: int, V: int, dtype: torch.dtype) -> Inputs:
    return {"logits": torch.randn(M, V, dtype=dtype), "token_ids": torch.randint(V, (M,))}


def forward_and_backward(op: Op, logits: Tensor, token_ids: Tensor) -> tuple[Tensor, ...]:
    logprobs, entropy = op(logits, token_ids)
    return torch.autograd.grad((logprobs + entropy).sum(), [logits])


CASES = [
    Case(op=gather_logprobs, name="forward", reference=gather_logprobs_reference, inputs=inputs,
         run=lambda op, **given: op(**given), cpu={"M": 1024, "V": 32000},
         gpu={"M": 8192, "V": 151936}, small={"M": 5, "V": 301}, compared={"M": 512},
         gpu_dtype=torch.bfloat16,
         bytes_moved=lambda M, V, dtype: M * V * dtype.itemsize),
    Case(op=gather_logprobs, name="with backward", reference=gather_logprobs_reference,
         inputs=inputs, run=forward_and_backward, gradients=("logits",),
         cpu={"M": 1024, "V": 32000}, gpu={"M": 8192, "V": 151936}, small={"M": 5, "V": 301},
         compared={"M": 512}, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda M, V, dtype: 3 * M * V * dtype.itemsize),
]
