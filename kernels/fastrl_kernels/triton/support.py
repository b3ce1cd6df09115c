"""Which tensors the Triton kernels take: the same answer for every op."""

import os

import torch


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run the op on such tensors; None where it can."""
    if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it computes in float32, the tensors are {str(dtype).removeprefix('torch.')}"
    return None
