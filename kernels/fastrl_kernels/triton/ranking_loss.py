"""ranking_loss on a GPU: all pairs of all prompts, their gradient and statistics in one launch.

    loss = sum_prompts (1 / n) sum_{w better than l} softplus(-(s_w - s_l)) / denominator

One program per prompt: it counts the pairs, then walks the K x K table in tiles of 16 x 16 (one
tile up to K = 16, more for larger groups) and sums each row's gradient over its partners. Reads 16
and writes 4 bytes per completion, and 20 bytes per prompt; the sums over prompts are torch's, in a
fixed order. Limits: float32, float16, bfloat16; computed in float32. Source: Ouyang et al. 2022
(arXiv 2203.02155), eq. 1.
"""

import itertools
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastrl_kernels.triton.support import DTYPES, AotCase, supports

__all__ = ["aot_cases", "ranking_loss", "supports"]

BLOCK_K = 16


@triton.jit  # type: ignore[untyped-decorator]
def _ranking_loss_fwd_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, ranks_ptr, cu_groups_ptr, dscores_ptr, sums_ptr, stride_scores, stride_ranks,
    ALL_PAIRS: tl.constexpr, BLOCK_K: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_groups_ptr + group)
    size = tl.load(cu_groups_ptr + group + 1) - start
    num_blocks = tl.cdiv(size, BLOCK_K)
    block = tl.arange(0, BLOCK_K)
    count = tl.zeros([], tl.float32)
    for tile in range(num_blocks * num_blocks):
        i, j = (tile // num_blocks) * BLOCK_K + block, (tile % num_blocks) * BLOCK_K + block
        rank_i = tl.load(ranks_ptr + (start + i) * stride_ranks, mask=i < size, other=0)
        rank_j = tl.load(ranks_ptr + (start + j) * stride_ranks, mask=j < size, other=0)
        is_pair = (i < size)[:, None] & (j < size)[None, :]
        count += tl.sum((is_pair & (rank_i[:, None] < rank_j[None, :])).to(tl.float32))
    num_pairs = tl.maximum(count, 1.0)
    if ALL_PAIRS:
        num_pairs = tl.maximum((size * (size - 1) // 2).to(tl.float32), 1.0)
    loss = tl.zeros([], tl.float32)
    correct = tl.zeros([], tl.float32)
    tied = tl.zeros([], tl.float32)
    total_margin = tl.zeros([], tl.float32)
    for block_i in range(num_blocks):
        i = block_i * BLOCK_K + block
        rank_i = tl.load(ranks_ptr + (start + i) * stride_ranks, mask=i < size, other=0)
        s_i = tl.load(scores_ptr + (start + i) * stride_scores, mask=i < size, other=0.0)
        dscores = tl.zeros([BLOCK_K], tl.float32)
        for block_j in range(num_blocks):
            j = block_j * BLOCK_K + block
            rank_j = tl.load(ranks_ptr + (start + j) * stride_ranks, mask=j < size, other=0)
            s_j = tl.load(scores_ptr + (start + j) * stride_scores, mask=j < size, other=0.0)
            is_pair = (i < size)[:, None] & (j < size)[None, :]
            is_better = is_pair & (rank_i[:, None] < rank_j[None, :])
            is_worse = is_pair & (rank_i[:, None] > rank_j[None, :])
            margin = s_i.to(tl.float32)[:, None] - s_j.to(tl.float32)[None, :]
            small = tl.exp(-tl.abs(margin))
            share = 1.0 / (1.0 + small)  # sigmoid(|margin|)
            up = tl.where(margin >= 0, small * share, share)  # sigmoid(-margin)
            down = tl.where(margin >= 0, share, small * share)  # sigmoid(margin)
            dscores += tl.sum(tl.where(is_worse, down, 0.0) - tl.where(is_better, up, 0.0), 1)
            softplus = tl.maximum(-margin, 0.0) + tl.log(1.0 + small)
            loss += tl.sum(tl.where(is_better, softplus, 0.0))
            correct += tl.sum((is_better & (margin > 0)).to(tl.float32))
            tied += tl.sum((is_better & (margin == 0)).to(tl.float32))
            total_margin += tl.sum(tl.where(is_better, margin, 0.0))
        tl.store(dscores_ptr + start + i, dscores / num_pairs, mask=i < size)
    tl.store(sums_ptr + group * 5, count)
    tl.store(sums_ptr + group * 5 + 1, loss / num_pairs)
    tl.store(sums_ptr + group * 5 + 2, correct)
    tl.store(sums_ptr + group * 5 + 3, correct + 0.5 * tied)
    tl.store(sums_ptr + group * 5 + 4, total_margin)


def ranking_loss_fwd(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, all_pairs: bool, denominator: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (float32), the statistics [6] in float64, and the gradient [R] like the scores."""
    dscores = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
    sums = torch.empty(len(cu_groups) - 1, 5, dtype=torch.float32, device=scores.device)
    _ranking_loss_fwd_kernel[(len(sums),)](
        scores, ranks, cu_groups.contiguous(), dscores, sums, scores.stride(0), ranks.stride(0),
        ALL_PAIRS=all_pairs, BLOCK_K=BLOCK_K,
    )
    totals = torch.cat([sums.double().sum(0), (sums[:, 0] > 0).double().sum()[None]])
    divisor = totals[5].clamp(min=1) if denominator is None else denominator
    return (totals[1] / divisor).float(), totals, (dscores / divisor).to(scores.dtype)


@torch.library.custom_op("fastrl_kernels::ranking_loss", mutates_args=())
def _fwd_op(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, all_pairs: bool, denominator: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return ranking_loss_fwd(scores, ranks, cu_groups, all_pairs, denominator)


@_fwd_op.register_fake
def _(scores: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (scores.new_empty((), dtype=torch.float32), scores.new_empty(6, dtype=torch.float64),
            scores.new_empty(scores.shape[0]))


class _RankingLoss(torch.autograd.Function):
    """The gradient is made in the forward pass; backward only scales it."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, ranks: Tensor, cu_groups: Tensor, all_pairs: bool,
        denominator: float | None,
    ) -> tuple[Tensor, Tensor]:
        run = _fwd_op if torch.compiler.is_compiling() else ranking_loss_fwd
        loss, totals, dscores = run(scores, ranks, cu_groups, all_pairs, denominator)
        ctx.save_for_backward(dscores)
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dscores,) = ctx.saved_tensors
        return dscores * dloss, None, None, None, None


def ranking_loss(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, *,
    ties: Literal["kept_pairs", "all_pairs"] = "kept_pairs", denominator: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """fastrl.ops.ranking_loss on this backend; the fields of RankingStats in a dict."""
    loss, totals = _RankingLoss.apply(  # type: ignore[no-untyped-call]
        scores, ranks, cu_groups, ties == "all_pairs", denominator)
    names = ("count", "ranking_loss", "correct", "correct_or_tied", "margin", "prompts")
    return loss, dict(zip(names, totals.unbind(), strict=True))


def aot_cases(every: bool = False) -> list[AotCase]:
    """See fastrl_kernels.triton.support."""
    types = {"ranks_ptr": "*i64", "cu_groups_ptr": "*i64",
             "dscores_ptr": "*fp32", "sums_ptr": "*fp32", "stride_scores": "i32",
             "stride_ranks": "i32"}
    return [
        (_ranking_loss_fwd_kernel, {**types, "scores_ptr": f"*{dtype}"},
         {"ALL_PAIRS": all_pairs, "BLOCK_K": BLOCK_K})
        for all_pairs, dtype in itertools.product((False, True) if every else (False,), DTYPES)
    ]
