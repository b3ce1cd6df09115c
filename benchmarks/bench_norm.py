"""The norms, forward and backward."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl import ops
from fastrl.ops import norm


def inputs(N: int, D: int, dtype: torch.dtype, name: str) -> Inputs:
    given = {"x": torch.randn(N, D, dtype=dtype), "weight": torch.randn(D, dtype=dtype),
             "dout": torch.randn(N, D, dtype=dtype)}
    if name.startswith("add_"):
        given |= {"residual": torch.randn(N, D, dtype=dtype),
                  "dsum": torch.randn(N, D, dtype=dtype)}
    return given | ({"bias": torch.randn(D, dtype=dtype)} if "layer" in name else {})


def forward_and_backward(op: Op, x: Tensor, weight: Tensor, dout: Tensor,
                         dsum: Tensor | None = None, **others: Tensor) -> tuple[Tensor, ...]:
    outputs = op(x=x, weight=weight, **others, epsilon=1e-5)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    leaves = [x, weight, *others.values()]
    douts = [dout] if dsum is None else [dout, dsum]
    return (*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, douts))


def liger_rms_norm(x: Tensor, weight: Tensor, *, epsilon: float) -> Tensor:
    """Liger-Kernel's, with the same casts and without overwriting its input's gradient."""
    from liger_kernel.transformers.functional import liger_rms_norm

    result: Tensor = liger_rms_norm(x, weight, epsilon, 0.0, "llama", False)
    return result


def liger_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float) -> Tensor:
    """Liger-Kernel's."""
    from liger_kernel.transformers.functional import liger_layer_norm

    result: Tensor = liger_layer_norm(x, weight, bias, epsilon)
    return result


# Elements of [N, D] that an ideal kernel reads and writes, forward and backward together.
CASES = [
    Case(op=getattr(ops, name), reference=getattr(norm, f"{name}_reference"),
         inputs=partial(inputs, name=name), run=forward_and_backward, gradients=gradients,
         cpu={"N": 4096, "D": 2048}, gpu={"N": 8192, "D": 4096}, small={"N": 5, "D": 37},
         gpu_dtype=torch.bfloat16, others=others,
         bytes_moved=lambda N, D, dtype, elements=elements: elements * N * D * dtype.itemsize)
    for name, gradients, elements, others in (
        ("rms_norm", ("x", "weight"), 5, {"liger": liger_rms_norm}),
        ("add_rms_norm", ("x", "residual", "weight"), 8, {}),
        ("layer_norm", ("x", "weight", "bias"), 5, {"liger": liger_layer_norm}),
        ("add_layer_norm", ("x", "residual", "weight", "bias"), 8, {}))
]
