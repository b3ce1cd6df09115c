"""prefix_attention, forward and backward: K completions of each prompt, the prompt packed once.

The provider "apart" repeats the prompt before every completion and calls packed_attention.
"""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import packed_attention, prefix_attention
from fastrl.ops.prefix_attention import prefix_attention_reference


def inputs(G: int, P: int, K: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    """G prompts of P tokens with K completions of S tokens each."""
    segments = [P, *[S] * K] * G
    query, key, value = (torch.randn(sum(segments), heads, C, dtype=dtype)
                         for heads in (Hq, Hk, Hk))
    return {"query": query, "key": key, "value": value, "max_seqlen": P + S,
            "cu_seqlens": torch.tensor([0, *segments]).cumsum(0),
            "prefixes": torch.tensor([p for g in range(G) for p in (-1, *[g * (K + 1)] * K)]),
            "num_keys": G * (P + K * (P + S))}


def attend_apart(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, prefixes: Tensor, *,
                 max_seqlen: int, num_keys: int, scale: float) -> Tensor:
    """[N, Hq, C]: the rows of each prompt are taken from its first sequence."""
    bounds, rows, kept, lengths = cu_seqlens.tolist(), list[int](), list[int](), [0]
    for b, prefix in enumerate(prefixes.tolist()):
        if prefix < 0:
            continue
        own = range(bounds[b], bounds[b + 1])
        before = range(bounds[prefix], bounds[prefix + 1])
        begin = len(rows) if b == prefix + 1 else len(rows) + len(before)
        rows += [*before, *own]
        kept += range(begin, len(rows))
        lengths.append(len(before) + len(own))
    index = torch.tensor(rows, device=query.device)
    out = packed_attention(
        query[index], key[index], value[index],
        torch.tensor(lengths, device=query.device).cumsum(0), max_seqlen=max_seqlen, scale=scale)
    return out[torch.tensor(kept, device=query.device)]


def forward_and_backward(op: Op, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor,
                         prefixes: Tensor, max_seqlen: int, num_keys: int) -> tuple[Tensor, ...]:
    out = op(query, key, value, cu_seqlens, prefixes, max_seqlen=max_seqlen, num_keys=num_keys,
             scale=query.shape[2] ** -0.5)
    return (out.detach(), *torch.autograd.grad(out.square().sum(), (query, key, value)))


def flops(G: int, P: int, K: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype) -> int:
    pairs = P * (P + 1) // 2 + K * (P * S + S * (S + 1) // 2)
    return 14 * G * pairs * Hq * C


CASES = [
    Case(op=prefix_attention, reference=prefix_attention_reference, inputs=inputs,
         run=forward_and_backward, gradients=("query", "key", "value"),
         cpu={"G": 2, "P": 256, "K": 6, "S": 64, "Hq": 8, "Hk": 4, "C": 32},
         gpu={"G": 8, "P": 1024, "K": 8, "S": 512, "Hq": 32, "Hk": 8, "C": 128},
         small={"G": 2, "P": 9, "K": 3, "S": 5, "Hq": 4, "Hk": 2, "C": 16},
         others={"apart": attend_apart}, gpu_dtype=torch.bfloat16, flops=flops)
]
