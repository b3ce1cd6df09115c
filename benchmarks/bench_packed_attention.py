"""packed_attention, forward and backward: equal and mixed lengths."""

from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import packed_attention
from fastrl.ops.packed_attention import packed_attention_reference


def lengths(B: int, S: int, mixed: bool) -> list[int]:
    """Tokens of each sequence: S, or from S / 8 to S."""
    return [S // 8 + (S - S // 8) * b // max(1, B - 1) if mixed else S for b in range(B)]


def inputs(B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool) -> Inputs:
    tokens = lengths(B, S, mixed)
    query, key, value = (torch.randn(sum(tokens), heads, C, dtype=dtype)
                         for heads in (Hq, Hk, Hk))
    return {"query": query, "key": key, "value": value, "max_seqlen": S,
            "cu_seqlens": torch.tensor([0, *tokens]).cumsum(0)}


def forward_and_backward(op: Op, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor,
                         max_seqlen: int) -> tuple[Tensor, ...]:
    out = op(query, key, value, cu_seqlens, max_seqlen=max_seqlen, scale=query.shape[2] ** -0.5)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value)))


def flops(B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool) -> int:
    pairs = sum(length * (length + 1) // 2 for length in lengths(B, S, mixed))
    return 14 * pairs * Hq * C


CASES = [
    Case(op=packed_attention, name=name,
         reference=packed_attention_reference, inputs=partial(inputs, mixed=mixed),
         run=forward_and_backward, gradients=("query", "key", "value"),
         cpu={"B": 65536 // S, "S": S // 16, "Hq": 8, "Hk": 4, "C": 8},
         gpu={"B": 8192 // S, "S": S, "Hq": 32, "Hk": 8, "C": 128},
         small={"B": 3, "S": 17, "Hq": 4, "Hk": 2, "C": 16}, gpu_dtype=torch.bfloat16,
         flops=partial(flops, mixed=mixed))
    # Of 1024 tokens, and of 4096, where "torch" takes another kernel on Hopper.
    for name, S, mixed in (("equal", 1024, False), ("mixed", 1024, True), ("long", 4096, False))
]
