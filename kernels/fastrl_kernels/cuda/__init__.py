"""Thin callers of the compiled CUDA ops, one file per op."""

import importlib
from functools import cache
from typing import Any

import torch


@cache
def compiled_ops() -> Any:
    """torch.ops.fastrl_cuda, whose schemas are in csrc/bindings.cpp, once the extension is loaded.

    Raises:
        ModuleNotFoundError: when the extension was not built.
    """
    importlib.import_module("fastrl_kernels._C")
    return torch.ops.fastrl_cuda


def stream_of(tensor: torch.Tensor) -> int:
    """The present stream of the tensor's device, as the compiled ops take it."""
    return torch.cuda.current_stream(tensor.device).cuda_stream
