"""What every Triton kernel file shares: which tensors it takes, and what is compiled without a GPU.

`aot_cases(every)` of a kernel file lists specialisations for compilation ahead of time: one per
kernel and type of tensor, or, with `every`, all that the launchers can ask for.
"""

import math
import os
from typing import Any

import torch
from torch import Tensor

AotCase = tuple[Any, dict[str, str], dict[str, Any]]
"""(kernel, Triton type of each argument, constants and launch options).

A type that ends in ":16" is that of an argument divisible by 16, as a launch finds out by itself.
"""
DTYPES = ("fp32", "fp16", "bf16")
"""Triton's names of the types that the kernels take."""


def is_interpreted() -> bool:
    """True where kernels run on CPU tensors, by Triton's own switch."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the op on such tensors; None where it can."""
    if device_type != "cuda" and not is_interpreted():
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {str(dtype).removeprefix('torch.')}"
    return None


def as_rows(x: Tensor) -> Tensor:
    """x [..., D] as [N, H, D] with stride 1 in D; a view, unless strides make that impossible."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    leading = x.shape[:-1]
    num_heads = leading[-1] if len(leading) > 1 else 1
    return x.reshape(math.prod(leading) // num_heads, num_heads, x.shape[-1])
