"""whiten of a rollout's advantages, with and without the moments that compute_gae gives."""

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import whiten
from fastrl.ops.whiten import row_moments, whiten_reference


def inputs(B: int, T: int, dtype: torch.dtype) -> Inputs:
    return {"values": torch.randn(B, T, dtype=dtype), "mask": torch.rand(B, T) > 0.2}


def inputs_with_moments(B: int, T: int, dtype: torch.dtype) -> Inputs:
    given = inputs(B, T, dtype)
    return {**given, "moments": row_moments(**given)}


CASES = [
    Case(op=whiten, name=name, reference=whiten_reference, inputs=make,
         run=lambda op, **given: op(**given),
         cpu={"B": 512, "T": 256}, gpu={"B": 512, "T": 1024}, small={"B": 3, "T": 37},
         bytes_moved=bytes_moved)
    for name, make, bytes_moved in (
        ("", inputs, lambda B, T, dtype: (10 + 4) * B * T),
        ("moments given", inputs_with_moments, lambda B, T, dtype: (5 + 4) * B * T))
]
