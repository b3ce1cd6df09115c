"""paged_attention: decode steps of equal and mixed lengths and of few sequences; prompts; samples.

Cases together_* and apart_* are one step over G samples of each prompt, whose P tokens are read
once or by every sample: the bytes are those of either way.
"""

from functools import partial

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import paged_attention
from fastrl.ops.paged_attention import SharedPrefixes, paged_attention_reference

LAYERS, PAGE_SIZE = 2, 16


def lengths(B: int, S: int, mixed: bool) -> list[int]:
    """Cached tokens of each sequence: S, or from S / B to S."""
    return [S * (b + 1) // B if mixed else S for b in range(B)]


def inputs(
    B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool, prompts: bool
) -> Inputs:
    pages = -(-S // PAGE_SIZE)
    lengths_q = torch.tensor(lengths(B, S, mixed) if prompts else [1] * B)
    return {"query": torch.randn(int(lengths_q.sum()), Hq, C, dtype=dtype),
            "kv_pages": torch.randn(B * pages, LAYERS, 2, PAGE_SIZE, Hk, C, dtype=dtype),
            "layer": 1, "page_table": torch.randperm(B * pages).view(B, pages),
            "kv_lens": torch.tensor(lengths(B, S, mixed)),
            "cu_seqlens_q": torch.nn.functional.pad(lengths_q.cumsum(0), (1, 0)),
            "max_seqlen_q": S if prompts else 1, "max_kv_len": S, "scale": C**-0.5}


def bytes_moved(
    B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool, prompts: bool
) -> int:
    tokens = sum(lengths(B, S, mixed))
    return (tokens * 2 * Hk + 2 * (tokens if prompts else B) * Hq) * C * dtype.itemsize


def flops(
    B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool, prompts: bool
) -> int:
    pairs = sum(length * (length + 1) // 2 if prompts else length
                for length in lengths(B, S, mixed))
    return 4 * pairs * Hq * C


def samples(
    B: int, G: int, P: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, together: bool
) -> Inputs:
    """B sequences of S tokens; every G of them begin with the same P, in whole pages."""
    given = inputs(B, S, Hq, Hk, C, dtype, mixed=False, prompts=False)
    table = given["page_table"].unflatten(0, (B // G, G))
    table[:, :, : P // PAGE_SIZE] = table[:, :1, : P // PAGE_SIZE].clone()
    groups = torch.stack([torch.arange(0, B, G), torch.full((B // G,), G)], dim=1)
    shared_lens = torch.full((B,), P)
    return {**given, "prefixes": SharedPrefixes(groups, shared_lens) if together else None}


def bytes_of_samples(
    B: int, G: int, P: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, together: bool
) -> int:
    tokens = (B // G * P if together else B * P) + B * (S - P)
    return (tokens * 2 * Hk + 2 * B * Hq) * C * dtype.itemsize


CPU_HEADS, GPU_HEADS = {"Hq": 8, "Hk": 2, "C": 48}, {"Hq": 32, "Hk": 8, "C": 128}
CASES = [
    Case(op=paged_attention, name=name, reference=paged_attention_reference,
         inputs=partial(inputs, mixed=mixed, prompts=prompts), run=lambda op, **given: op(**given),
         cpu={**cpu, **CPU_HEADS}, gpu={**gpu, **GPU_HEADS},
         small={"B": 3, "S": 37, "Hq": 4, "Hk": 2, "C": 16}, gpu_dtype=torch.bfloat16,
         bytes_moved=partial(bytes_moved, mixed=mixed, prompts=prompts),
         flops=partial(flops, mixed=mixed, prompts=prompts))
    for name, mixed, prompts, cpu, gpu in (
        ("equal", False, False, {"B": 64, "S": 256}, {"B": 256, "S": 2048}),
        ("mixed", True, False, {"B": 64, "S": 256}, {"B": 256, "S": 2048}),
        ("few", False, False, {"B": 4, "S": 256}, {"B": 16, "S": 1024}),
        ("prompts", True, True, {"B": 16, "S": 128}, {"B": 16, "S": 1024}))] + [
    Case(op=paged_attention, name=f"{'together' if together else 'apart'}_{G}",
         reference=paged_attention_reference, inputs=partial(samples, together=together),
         run=lambda op, **given: op(**given),
         cpu={"B": 2 * G, "G": G, "P": 128, "S": 256, **CPU_HEADS},
         gpu={"B": B, "G": G, "P": 512, "S": 1024, **GPU_HEADS},
         small={"B": 4, "G": 2, "P": 16, "S": 37, "Hq": 4, "Hk": 2, "C": 16},
         gpu_dtype=torch.bfloat16, bytes_moved=partial(bytes_of_samples, together=together),
         flops=lambda B, G, P, S, Hq, Hk, C, dtype: 4 * B * S * Hq * C)
    for G, B in ((16, 256), (8, 256))
    for together in (True, False)
]
