"""Rotation of queries and keys, alone and after their norms, forward and backward."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops.rotary import (
    qk_norm_rotary,
    qk_norm_rotary_reference,
    rotary,
    rotary_reference,
)


def inputs(N: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, has_norms: bool) -> Inputs:
    angles = 1000 * torch.rand(N, 1, C // 2)
    given = {"query": torch.randn(N, Hq, C, dtype=dtype), "key": torch.randn(N, Hk, C, dtype=dtype),
             "cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
             "dquery": torch.randn(N, Hq, C, dtype=dtype),
             "dkey": torch.randn(N, Hk, C, dtype=dtype)}
    if has_norms:
        given |= {"q_weight": torch.randn(C, dtype=dtype), "k_weight": torch.randn(C, dtype=dtype)}
    return given


def forward_and_backward(op: Op, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor,
                         dquery: Tensor, dkey: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
    options = {"epsilon": 1e-6} if weights else {}
    outputs = op(query=query, key=key, cos=cos, sin=sin, **weights, **options)
    leaves = [query, key, *weights.values()]
    return (*(out.detach() for out in outputs),
            *torch.autograd.grad(outputs, leaves, [dquery, dkey]))


# Queries and keys, read and written: twice forward; backward twice, and with norms once more.
CASES = [
    Case(op=op, reference=reference,
         inputs=partial(inputs, has_norms=len(gradients) > 2), run=forward_and_backward,
         gradients=gradients, cpu={"N": 4096, "Hq": 6, "Hk": 6, "C": 48},
         gpu={"N": 8192, "Hq": 32, "Hk": 8, "C": 128}, small={"N": 3, "Hq": 2, "Hk": 1, "C": 10},
         gpu_dtype=torch.bfloat16,
         bytes_moved=lambda N, Hq, Hk, C, dtype, passes=passes:
             passes * N * (Hq + Hk) * C * dtype.itemsize)
    for op, reference, gradients, passes in (
        (rotary, rotary_reference, ("query", "key"), 4),
        (qk_norm_rotary, qk_norm_rotary_reference, ("query", "key", "q_weight", "k_weight"), 5))
]
