"""ranking_loss, forward and backward, of the paper's batch: 64 prompts of 9 completions."""

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import ranking_loss
from fastrl.ops.ranking_loss import ranking_loss_reference


def inputs(B: int, K: int, dtype: torch.dtype) -> Inputs:
    return {"scores": torch.randn(B * K, dtype=dtype), "ranks": torch.randint(K, (B * K,)),
            "cu_groups": torch.arange(0, B * K + 1, K)}


def forward_and_backward(op: Op, scores: Tensor, ranks: Tensor, cu_groups: Tensor
                         ) -> tuple[Tensor, ...]:
    loss, _ = op(scores, ranks, cu_groups)
    return (loss.detach(), *torch.autograd.grad(loss, [scores]))


CASES = [Case(
    op=ranking_loss, reference=ranking_loss_reference, inputs=inputs, run=forward_and_backward,
    gradients=("scores",), cpu={"B": 64, "K": 9}, gpu={"B": 64, "K": 9}, small={"B": 3, "K": 4},
    bytes_moved=lambda B, K, dtype: (4 + 8 + 4) * B * K,
)]
