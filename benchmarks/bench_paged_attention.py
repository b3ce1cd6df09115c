"""paged_attention of a decode step: equal and mixed lengths, grouped queries."""

from functools import partial

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import paged_attention
from fastrl.ops.paged_attention import paged_attention_reference

LAYERS, PAGE_SIZE = 2, 16


def lengths(B: int, S: int, mixed: bool) -> list[int]:
    """Cached tokens of each sequence: S, or from S / B to S."""
    return [S * (b + 1) // B if mixed else S for b in range(B)]


def inputs(B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool) -> Inputs:
    pages = -(-S // PAGE_SIZE)
    return {"query": torch.randn(B, Hq, C, dtype=dtype),
            "kv_pages": torch.randn(B * pages, LAYERS, 2, PAGE_SIZE, Hk, C, dtype=dtype),
            "layer": 1, "page_table": torch.randperm(B * pages).view(B, pages),
            "kv_lens": torch.tensor(lengths(B, S, mixed)), "cu_seqlens_q": torch.arange(B + 1),
            "max_seqlen_q": 1, "max_kv_len": S, "scale": C**-0.5}


def bytes_moved(B: int, S: int, Hq: int, Hk: int, C: int, dtype: torch.dtype, mixed: bool) -> int:
    return (sum(lengths(B, S, mixed)) * 2 * Hk + 2 * B * Hq) * C * dtype.itemsize


CASES = [
    Case(op=paged_attention, name="mixed" if mixed else "equal",
         reference=paged_attention_reference, inputs=partial(inputs, mixed=mixed),
         run=lambda op, **given: op(**given),
         cpu={"B": 64, "S": 256, "Hq": 8, "Hk": 2, "C": 48},
         gpu={"B": 256, "S": 2048, "Hq": 32, "Hk": 8, "C": 128},
         small={"B": 3, "S": 37, "Hq": 4, "Hk": 2, "C": 16}, gpu_dtype=torch.bfloat16,
         bytes_moved=partial(bytes_moved, mixed=mixed))
    for mixed in (False, True)
]
