"""What writes pages: keys and values of a decode step and of a prefill, one layer; forks."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import copy_pages, rotary_write_kv, write_kv
from fastrl.ops.kv_cache import (
    copy_pages_reference,
    rotary_write_kv_reference,
    write_kv_reference,
)

LAYERS, PAGE_SIZE = 2, 16


def pages_and_slots(N: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    num_pages = max(64, 2 * N // PAGE_SIZE)
    return {"kv_pages": torch.randn(num_pages, LAYERS, 2, PAGE_SIZE, Hk, C, dtype=dtype),
            "slot_mapping": torch.randperm(num_pages * PAGE_SIZE)[:N]}


def inputs(N: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    key, value = torch.randn(2, N, Hk, C, dtype=dtype)
    return {"key": key, "value": value, **pages_and_slots(N, Hk, C, dtype)}


def write(op: Op, key: Tensor, value: Tensor, kv_pages: Tensor, slot_mapping: Tensor) -> Tensor:
    op(key, value, kv_pages, 1, slot_mapping)
    return kv_pages


def merged(N: int, Hq: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    angles, weights = 1000 * torch.rand(N, 1, C // 2), torch.randn(2, C, dtype=dtype)
    return {"heads": torch.randn(N, Hq + 2 * Hk, C, dtype=dtype), "cos": angles.cos().to(dtype),
            "sin": angles.sin().to(dtype), "q_weight": weights[0], "k_weight": weights[1],
            **pages_and_slots(N, Hk, C, dtype)}


def turn_and_write(op: Op, heads: Tensor, kv_pages: Tensor, slot_mapping: Tensor,
                   **options: Tensor) -> tuple[Tensor, Tensor]:
    return op(heads, kv_pages, 1, slot_mapping, **options, epsilon=1e-6), kv_pages


def forks(F: int, L: int, Hk: int, C: int, dtype: torch.dtype) -> Inputs:
    ids = torch.randperm(2 * F)
    return {"kv_pages": torch.randn(2 * F, L, 2, PAGE_SIZE, Hk, C, dtype=dtype),
            "sources": ids[:F], "targets": ids[F:]}


def fork(op: Op, kv_pages: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    op(kv_pages, sources, targets)
    return kv_pages


STEPS = (("decode", 64, 256), ("prefill", 4096, 8192))
CASES = [
    *(Case(op=write_kv, name=name, reference=write_kv_reference, inputs=inputs, run=write,
           cpu={"N": cpu, "Hk": 6, "C": 48}, gpu={"N": gpu, "Hk": 8, "C": 128},
           small={"N": 7, "Hk": 2, "C": 8}, gpu_dtype=torch.bfloat16,
           bytes_moved=lambda N, Hk, C, dtype: 2 * 2 * N * Hk * C * dtype.itemsize)
      for name, cpu, gpu in STEPS),
    *(Case(op=rotary_write_kv, name=name, reference=rotary_write_kv_reference, inputs=merged,
           run=turn_and_write, cpu={"N": cpu, "Hq": 6, "Hk": 6, "C": 48},
           gpu={"N": gpu, "Hq": 32, "Hk": 8, "C": 128}, small={"N": 7, "Hq": 3, "Hk": 2, "C": 8},
           gpu_dtype=torch.bfloat16,
           bytes_moved=lambda N, Hq, Hk, C, dtype: 2 * N * (Hq + 2 * Hk) * C * dtype.itemsize)
      for name, cpu, gpu in STEPS),
    Case(op=copy_pages, reference=copy_pages_reference, inputs=forks, run=fork,
         cpu={"F": 64, "L": 6, "Hk": 6, "C": 48}, gpu={"F": 1024, "L": 36, "Hk": 8, "C": 128},
         small={"F": 3, "L": 2, "Hk": 2, "C": 8}, gpu_dtype=torch.bfloat16,
         bytes_moved=lambda F, L, Hk, C, dtype: 2 * F * L * 2 * PAGE_SIZE * Hk * C
             * dtype.itemsize),
]
