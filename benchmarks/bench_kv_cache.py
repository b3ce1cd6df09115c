"""write_kv of a decode step and of a prefill, one layer."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import write_kv
from fastrl.ops.kv_cache import write_kv_reference

LAYERS, PAGE_SIZE = 2, 16


def inputs(N: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    key, value = torch.randn(2, N, Hk, C, dtype=dtype)
    num_pages = max(64, 2 * N // PAGE_SIZE)
    return {"key": key, "value": value,
            "kv_pages": torch.randn(num_pages, LAYERS, 2, PAGE_SIZE, Hk, C, dtype=dtype),
            "slot_mapping": torch.randperm(num_pages * PAGE_SIZE)[:N]}


def write(op: Op, key: Tensor, value: Tensor, kv_pages: Tensor, slot_mapping: Tensor) -> Tensor:
    op(key, value, kv_pages, 1, slot_mapping)
    return kv_pages


CASES = [
    Case(op=write_kv, name=name, reference=write_kv_reference, inputs=inputs, run=write,
         cpu={"N": cpu, "Hk": 6, "C": 48}, gpu={"N": gpu, "Hk": 8, "C": 128},
         small={"N": 7, "Hk": 2, "C": 8}, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda N, Hk, C, dtype: 2 * 2 * N * Hk * C * dtype.itemsize)
    for name, cpu, gpu in (("decode", 64, 256), ("prefill", 4096, 8192))
]
