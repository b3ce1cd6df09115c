"""linear, the rows of a decode step and of an update, and the latter with its backward pass."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import linear
from fastrl.ops.linear import linear_reference


def inputs(N: int, D: int, O: int, dtype: torch.dtype) -> Inputs:  # noqa: E741
    return {"x": torch.randn(N, D, dtype=dtype), "weight": torch.randn(O, D, dtype=dtype) * D**-0.5}


def backward_inputs(N: int, D: int, O: int, dtype: torch.dtype) -> Inputs:  # noqa: E741
    return inputs(N, D, O, dtype) | {"dy": torch.randn(N, O, dtype=dtype)}


def forward_and_backward(op: Op, x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    y = op(x, weight)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


SMALL = {"N": 5, "D": 17, "O": 33}
CASES = [
    *(Case(op=linear, name=name, reference=linear_reference, inputs=inputs,
           run=lambda op, **given: op(**given), cpu={"N": cpu, "D": 288, "O": 1536},
           gpu={"N": gpu, "D": 4096, "O": 28672}, small=SMALL, gpu_dtype=torch.bfloat16,
           bytes_moved=lambda N, D, O, dtype: (N * D + D * O + N * O) * dtype.itemsize,  # noqa: E741
           flops=lambda N, D, O, dtype: 2 * N * D * O)  # noqa: E741
      for name, cpu, gpu in (("decode step", 16, 64), ("update", 2048, 8192))),
    Case(op=linear, name="with backward", reference=linear_reference, inputs=backward_inputs,
         run=forward_and_backward, gradients=("x", "weight"),
         cpu={"N": 2048, "D": 288, "O": 1536}, gpu={"N": 8192, "D": 4096, "O": 28672},
         small=SMALL, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda N, D, O, dtype: (  # noqa: E741
             3 * N * D + 3 * D * O + 3 * N * O) * dtype.itemsize,
         flops=lambda N, D, O, dtype: 6 * N * D * O),  # noqa: E741
]
