"""compute_gae of a rollout."""

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import compute_gae
from fastrl.ops.gae import compute_gae_reference


def inputs(B: int, T: int, dtype: torch.dtype) -> Inputs:
    rewards, values = torch.randn(2, B, T, dtype=dtype)
    return {"rewards": rewards, "values": values,
            "response_mask": torch.arange(T) < torch.randint(1, T, (B, 1))}


CASES = [Case(
    op=compute_gae, reference=compute_gae_reference, inputs=inputs,
    run=lambda op, **given: op(**given),
    cpu={"B": 512, "T": 1024}, gpu={"B": 512, "T": 1024}, small={"B": 3, "T": 37},
    bytes_moved=lambda B, T, dtype: (9 + 8) * B * T,
    not_compiled="torch.compile unrolls the loop over time",
)]
