"""shape_rewards of a rollout."""

import torch

from benchmarks.cases import Case, Inputs
from fastrl.ops import shape_rewards
from fastrl.ops.rewards import shape_rewards_reference


def inputs(B: int, T: int, dtype: torch.dtype) -> Inputs:
    logprobs, ref_logprobs = -torch.rand(2, B, T, dtype=dtype)
    return {"scores": torch.randn(B), "logprobs": logprobs, "ref_logprobs": ref_logprobs,
            "response_mask": torch.arange(T) < torch.randint(1, T, (B, 1)), "kl_coef": 0.02}


CASES = [Case(
    op=shape_rewards, reference=shape_rewards_reference, inputs=inputs,
    run=lambda op, **given: op(**given),
    cpu={"B": 512, "T": 256}, gpu={"B": 512, "T": 1024}, small={"B": 3, "T": 37},
    bytes_moved=lambda B, T, dtype: (9 + 8) * B * T,
)]
