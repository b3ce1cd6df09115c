"""masked_mean of a rollout's advantages."""

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import masked_mean
from fastrl.ops.masked import masked_mean_reference


def inputs(B: int, T: int, dtype: torch.dtype) -> Inputs:
    return {"values": torch.randn(B, T, dtype=dtype), "mask": torch.rand(B, T) > 0.2}


CASES = [Case(
    op=masked_mean, reference=masked_mean_reference, inputs=inputs,
    run=lambda op, **given: op(**given),
    cpu={"B": 512, "T": 256}, gpu={"B": 512, "T": 1024}, small={"B": 3, "T": 37},
    bytes_moved=lambda B, T, dtype: 5 * B * T,
)]
