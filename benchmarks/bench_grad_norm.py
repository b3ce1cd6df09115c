"""grad_norm of a model's gradients."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs
from fastrl.ops import grad_norm
from fastrl.ops.grad_norm import grad_norm_reference


def inputs(K: int, D: int, dtype: torch.dtype) -> Inputs:
    return {f"gradient{i}": torch.randn(shape, dtype=dtype)
            for i, shape in enumerate([(D, D)] * K + [(D,)] * K)}


def foreach(gradients: list[Tensor]) -> Tensor:
    """What torch.nn.utils.clip_grad_norm_ does."""
    norms = torch._foreach_norm(gradients)
    result: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return result


CASES = [Case(
    op=grad_norm, reference=grad_norm_reference, inputs=inputs,
    run=lambda op, **given: op(list(given.values())),
    cpu={"K": 14, "D": 1024}, gpu={"K": 64, "D": 4096}, small={"K": 2, "D": 20},
    gpu_dtype=torch.bfloat16, compared={"K": 2}, others={"foreach": foreach},
    bytes_moved=lambda K, D, dtype: K * (D * D + D) * dtype.itemsize,
)]
