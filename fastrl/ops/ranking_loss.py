"""ranking_loss: the pairwise loss of a reward model over all comparisons of each prompt.

    loss = sum_prompts (1 / n) sum_{w better than l} softplus(-(s_w - s_l)) / denominator
"""

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.backends import choose
from fastrl.checks import (
    check_device,
    check_float,
    check_index,
    check_offsets,
    check_positive,
    check_shape,
    check_values,
    wide_dtype,
)
from fastrl.errors import ConfigError, ShapeError

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton")
TIES = ("kept_pairs", "all_pairs")


@dataclass(frozen=True, slots=True)
class RankingStats:
    """Detached sums, float64 scalars. Statistics of microbatches are combined with `+`."""

    count: Tensor
    """Number of pairs that have a better side."""
    prompts: Tensor
    """Number of prompts with at least one such pair."""
    ranking_loss: Tensor
    """Losses of the prompts, before division by the denominator."""
    correct: Tensor
    """Number of pairs whose better side scores strictly higher."""
    correct_or_tied: Tensor
    """The same, with equal scores as one half."""
    margin: Tensor
    """Score of the better side minus score of the other."""

    def __add__(self, other: "RankingStats") -> "RankingStats":
        """Statistics of both microbatches together."""
        return RankingStats(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )


def ranking_loss_reference(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    *,
    ties: Literal["kept_pairs", "all_pairs"] = "kept_pairs",
    denominator: float | None = None,
) -> tuple[Tensor, RankingStats]:
    """ranking_loss in plain torch, over all pairs of all prompts at once."""
    sizes = cu_groups[1:] - cu_groups[:-1]  # [B]
    groups, better, worse = ranked_pairs(ranks, cu_groups)
    num_kept = torch.bincount(groups, minlength=len(sizes))  # [B]
    num_pairs = num_kept if ties == "kept_pairs" else sizes * (sizes - 1) // 2
    scores = scores.to(wide_dtype(scores.dtype))
    margins = scores[better] - scores[worse]
    losses = F.softplus(-margins) / num_pairs[groups]
    num_prompts = (num_kept > 0).sum()
    divisor = num_prompts.clamp(min=1) if denominator is None else denominator
    margins = margins.detach().double()
    stats = RankingStats(
        count=num_kept.sum().double(),
        prompts=num_prompts.double(),
        ranking_loss=losses.detach().double().sum(),
        correct=(margins > 0).double().sum(),
        correct_or_tied=((margins > 0).double() + 0.5 * (margins == 0).double()).sum(),
        margin=margins.sum(),
    )
    return losses.sum() / divisor, stats


def ranked_pairs(ranks: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of completions of one prompt that has a better side.

    Args:
        ranks: [R] int64, 0 is best, equal ranks are ties.
        cu_groups: [B+1] int64.
    Returns:
        groups, better, worse: [P] int64 each: the prompt, and the two rows of each pair.
    """
    sizes = cu_groups[1:] - cu_groups[:-1]
    rows = torch.arange(len(ranks), device=ranks.device)
    group_of_row = torch.repeat_interleave(
        torch.arange(len(sizes), device=ranks.device), sizes, output_size=len(ranks)
    )
    # Row i meets each of the K rows of its own group: K * K ordered pairs per group, end to end.
    partners = sizes[group_of_row]  # [R]
    first = torch.repeat_interleave(rows, partners)
    first_pair = partners.cumsum(0) - partners  # [R], where the pairs of row i begin
    offset = torch.arange(len(first), device=ranks.device) - first_pair[first]
    second = cu_groups[:-1][group_of_row[first]] + offset
    is_ranked = ranks[first] < ranks[second]
    first, second = first[is_ranked], second[is_ranked]
    return group_of_row[first], first, second


def _check(
    scores: Tensor, ranks: Tensor, cu_groups: Tensor, ties: str, denominator: float | None
) -> None:
    op = "ranking_loss"
    check_shape(op, {"scores": scores, "ranks": ranks}, ndim=1, layout="[R]")
    check_float(op, scores=scores)
    check_index(op, ranks=ranks, cu_groups=cu_groups)
    check_device(op, {"scores": scores, "cu_groups": cu_groups})
    check_positive(op, denominator=denominator)
    if cu_groups.dim() != 1 or len(cu_groups) < 2:
        raise ShapeError(f"{op}: expected cu_groups [B+1] with B at least 1, got "
                         f"{list(cu_groups.shape)}")
    if ties not in TIES:
        raise ConfigError(f"{op}: expected ties kept_pairs or all_pairs, got {ties!r}")
    check_offsets(op, len(scores), cu_groups=cu_groups)
    check_values(op, scores=scores)


def ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    cu_groups: Tensor,
    *,
    ties: Literal["kept_pairs", "all_pairs"] = "kept_pairs",
    denominator: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, RankingStats]:
    """Mean over prompts of the mean over the prompt's pairs of -log sigmoid(s_better - s_worse).

        loss = sum_prompts (1 / n) sum_{w better than l} softplus(-(s_w - s_l)) / denominator

    Args:
        scores: [R] float. One per completion, prompts end to end; differentiable.
        ranks: [R] int64. 0 is best; completions of equal rank are not compared.
        cu_groups: [B+1] int64. Where the completions of each prompt begin; the last entry is R.
        ties: n counts the pairs that are compared ("kept_pairs") or all K(K-1)/2 ("all_pairs").
        denominator: Prompts of the whole minibatch; None: those here with at least one comparison.
        backend: See fastrl.backends.
    Returns:
        loss: Scalar float32 (float64 for float64); 0 when nothing is compared.
        stats: RankingStats.
    Raises:
        ShapeError: when shapes, dtypes or devices do not fit together.
        ConfigError: when there is no such `ties`, or the denominator is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: sum of K^2 over prompts, a few passes.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), eq. 1.
    Example:
        >>> scores, ranks = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0, 1, 1])
        >>> loss, stats = ranking_loss(scores, ranks, torch.tensor([0, 3]))
        >>> round(float(loss), 4), float(stats.count), float(stats.margin)
        (0.2201, 2.0, 3.0)
    """
    _check(scores, ranks, cu_groups, ties, denominator)
    name = choose("ranking_loss", "ranking_loss", PREFERENCE, scores.device.type, scores.dtype,
                  backend)
    if name == "triton":
        from fastrl_kernels.triton import ranking_loss as kernel

        loss, sums = kernel.ranking_loss(scores, ranks, cu_groups, ties=ties,
                                         denominator=denominator)
        return loss, RankingStats(**sums)
    return ranking_loss_reference(scores, ranks, cu_groups, ties=ties, denominator=denominator)
