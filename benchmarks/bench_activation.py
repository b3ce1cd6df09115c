"""swiglu and gelu, forward and backward."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import activation, gelu, swiglu


def inputs(N: int, I: int, dtype: torch.dtype, halves: int) -> Inputs:  # noqa: E741
    return {"x": torch.randn(N, halves * I, dtype=dtype), "dout": torch.randn(N, I, dtype=dtype)}


def forward_and_backward(op: Op, x: Tensor, dout: Tensor, **settings: str) -> tuple[Tensor, ...]:
    y = op(x, **settings)
    return y.detach(), *torch.autograd.grad(y, x, dout)


def liger_swiglu(gate_up: Tensor) -> Tensor:
    """Liger-Kernel's, which takes gate and up as two tensors."""
    from liger_kernel.transformers.functional import liger_swiglu

    result: Tensor = liger_swiglu(*gate_up.chunk(2, dim=-1))
    return result


SIZES = {"cpu": {"N": 4096, "I": 2048}, "gpu": {"N": 8192, "I": 14336}, "small": {"N": 5, "I": 37}}
# Elements of [N, I] that an ideal kernel reads and writes, forward and backward together.
CASES = [
    Case(op=swiglu, reference=activation.swiglu_reference, inputs=partial(inputs, halves=2),
         run=forward_and_backward, gradients=("x",), gpu_dtype=torch.bfloat16, **SIZES,
         others={"liger": liger_swiglu},
         bytes_moved=lambda N, I, dtype: 8 * N * I * dtype.itemsize),  # noqa: E741
    *(Case(op=gelu, reference=activation.gelu_reference, inputs=partial(inputs, halves=1),
           run=partial(forward_and_backward, approximate=approximate), name=approximate,
           gradients=("x",), gpu_dtype=torch.bfloat16, **SIZES,
           bytes_moved=lambda N, I, dtype: 5 * N * I * dtype.itemsize)  # noqa: E741
      for approximate in ("none", "tanh")),
]
