"""grad_norm on a GPU: one launch per dtype and one that merges in float64; see csrc/grad_norm.cu.

    norm = sqrt(sum over tensors and elements of g^2)

Limits: float32, float16, bfloat16; a square beyond float32 is infinite.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastrl_kernels.cuda import compiled_ops, stream_of
from fastrl_kernels.cuda.gae import supports
from fastrl_kernels.multi_tensor import tensor_table

__all__ = ["grad_norm", "supports"]

TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """[n] float64, the sums of squares of n parts of contiguous gradients of one dtype."""
    table, chunks = tensor_table(tuple((g.data_ptr(),) for g in gradients),
                                 tuple(g.numel() for g in gradients), gradients[0].device)
    sums = torch.empty(len(chunks), dtype=torch.float64, device=table.device)
    compiled_ops().grad_norm_parts(table, chunks, TYPES[gradients[0].dtype], sums,
                                   stream_of(table))
    return sums


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm, float64, of gradients of any dtypes."""
    dtypes = dict.fromkeys(g.dtype for g in gradients)
    sums = torch.cat([squares([g.contiguous() for g in gradients if g.dtype == dtype])
                      for dtype in dtypes])
    norm = sums.new_empty(())
    compiled_ops().grad_norm_merge(sums, norm, stream_of(sums))
    return norm


# What a compiled graph holds: the table is made of addresses, which a trace does not have.
_norm_op = torch.library.custom_op("fastrl_cuda::grad_norm", norm_of, mutates_args=())


@_norm_op.register_fake
def _(gradients: Sequence[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float64)


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm, a float64 scalar; arguments as in fastrl.ops.grad_norm."""
    return _norm_op(gradients) if torch.compiler.is_compiling() else norm_of(gradients)
