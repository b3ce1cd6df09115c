"""grad_norm on a GPU: the squares of every gradient in one launch, merged in float64.

    norm = sqrt(sum over tensors and elements of g^2)

A program takes 16384 elements of one tensor, found through a table of addresses, adds up squares in
float32, eight to a lane, then the lanes in float64. The sums of the programs are added by torch in
float64; there are no atomics, so equal gradients give equal bits. Reads each gradient once. Limits:
float32, float16, bfloat16; a square beyond float32 is infinite.
"""

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.multi_tensor import CHUNK, by_alignment, tensor_table
from fastrl_kernels.triton.support import AotCase, supports

__all__ = ["aot_cases", "grad_norm", "supports"]

BLOCK = 2048
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@triton.jit  # type: ignore[untyped-decorator]
def _squares_kernel(  # type: ignore[no-untyped-def]
    table_ptr, chunks_ptr, sums_ptr, TYPE: tl.constexpr, IS_ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(chunks_ptr + 2 * chunk).to(tl.int64) * 2
    start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    address = tl.load(row_ptr)
    numel = tl.load(row_ptr + 1)
    if TYPE == 0:
        gradient_ptr = address.to(tl.pointer_type(tl.float32))
    elif TYPE == 1:
        gradient_ptr = address.to(tl.pointer_type(tl.float16))
    else:
        gradient_ptr = address.to(tl.pointer_type(tl.bfloat16))
    if IS_ALIGNED:
        gradient_ptr = tl.multiple_of(gradient_ptr, 16)
        numel = tl.multiple_of(numel, 16)
    squares = tl.zeros([BLOCK], tl.float32)
    for begin in range(start, tl.minimum(start + CHUNK, numel), BLOCK):
        i = begin + tl.arange(0, BLOCK)
        g = tl.load(gradient_ptr + i, mask=i < numel, other=0.0).to(tl.float32)
        squares += g * g
    tl.store(sums_ptr + chunk, tl.sum(squares.to(tl.float64)))


def squares(gradients: Sequence[Tensor]) -> Tensor:
    """[n] float64, the sums of squares of n parts of contiguous gradients of one dtype."""
    rows = tuple((g.data_ptr(),) for g in gradients)
    parts = []
    for is_aligned, *group in by_alignment(rows, tuple(g.numel() for g in gradients), 1):
        table, chunks = tensor_table(*group, gradients[0].device)
        sums = torch.empty(len(chunks), dtype=torch.float64, device=table.device)
        if len(chunks) > 0:
            _squares_kernel[(len(chunks),)](
                table, chunks, sums, TYPE=TYPES[gradients[0].dtype], IS_ALIGNED=is_aligned,
                CHUNK=CHUNK, BLOCK=BLOCK)
        parts.append(sums)
    return torch.cat(parts)


def norm_of(gradients: Sequence[Tensor]) -> Tensor:
    """The norm, float64, of gradients of any dtypes."""
    dtypes = dict.fromkeys(g.dtype for g in gradients)
    return torch.cat([squares([g.contiguous() for g in gradients if g.dtype == dtype])
                      for dtype in dtypes]).sum().sqrt()


# What a compiled graph holds: the table is made of addresses, which a trace does not have.
_norm_op = torch.library.custom_op("fastrl_kernels::grad_norm", norm_of, mutates_args=())


@_norm_op.register_fake
def _(gradients: Sequence[Tensor]) -> Tensor:
    return gradients[0].new_empty((), dtype=torch.float64)


@torch.no_grad()
def grad_norm(gradients: Sequence[Tensor]) -> Tensor:
    """fastrl.ops.grad_norm on this backend."""
    return _norm_op(gradients) if torch.compiler.is_compiling() else norm_of(gradients)


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {"table_ptr": "*i64", "chunks_ptr": "*i32", "sums_ptr": "*fp64"}
    return [
        (_squares_kernel, types,
         {"TYPE": number, "IS_ALIGNED": is_aligned, "CHUNK": CHUNK, "BLOCK": BLOCK})
        for number, is_aligned in itertools.product(
            TYPES.values(), (True, False) if every else (True,))
    ]
