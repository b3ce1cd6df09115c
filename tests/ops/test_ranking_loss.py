"""ranking_loss: golden numbers, ties, ragged groups, and any split by prompts."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import ranking_loss


def prompts(sizes: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, ranks with ties, and bounds of prompts with these numbers of completions."""
    cu_groups = torch.tensor([0, *sizes]).cumsum(0)
    scores = torch.randn(int(cu_groups[-1]), dtype=dtype, requires_grad=True)
    return scores, torch.randint(3, scores.shape), cu_groups


def by_hand(scores: list[float], ranks: list[int], ties: str) -> float | None:
    """The loss of one prompt, pair by pair."""
    losses = [math.log1p(math.exp(-(scores[i] - scores[j])))
              for i, j in itertools.permutations(range(len(scores)), 2) if ranks[i] < ranks[j]]
    pairs = len(losses) if ties == "kept_pairs" else math.comb(len(scores), 2)
    return sum(losses) / pairs if losses else None


def test_golden(golden: SimpleNamespace) -> None:
    scores = torch.tensor(golden.RANKING_SCORES, dtype=torch.float64, requires_grad=True)
    loss, stats = ranking_loss(scores, torch.arange(4), torch.tensor([0, 4]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == pytest.approx(golden.RANKING_LOSS, abs=6e-8)
    torch.testing.assert_close(gradient, torch.tensor(golden.RANKING_GRADIENT,
                                                      dtype=torch.float64), rtol=0, atol=6e-7)
    assert gradient.sum().item() == pytest.approx(0, abs=1e-15)
    assert (stats.count.item(), stats.prompts.item(), stats.correct.item()) == (6, 1, 6)
    assert stats.margin.item() == pytest.approx(6.5)  # .5 + 1 + 2 + .5 + 1.5 + 1


@pytest.mark.parametrize("ties", ["kept_pairs", "all_pairs"])
def test_golden_tie(golden: SimpleNamespace, ties: str) -> None:
    scores = torch.tensor(golden.RANKING_SCORES, dtype=torch.float64)
    ranks = torch.tensor(golden.RANKING_TIE_RANKS)
    loss, stats = ranking_loss(scores, ranks, torch.tensor([0, 4]), ties=ties)
    expected = getattr(golden, f"RANKING_TIE_LOSS_{ties.upper()}")
    assert loss.item() == pytest.approx(expected, abs=6e-8)
    assert stats.count.item() == 5


# Two completions; the paper's 4 to 9; prompts whose completions are all tied fall out.
@pytest.mark.parametrize("ties", ["kept_pairs", "all_pairs"])
@pytest.mark.parametrize("sizes", [[2], [4, 9, 2, 5], [2] * 40, [1, 3], [300, 2]])
def test_equals_pairs_by_hand(sizes: list[int], ties: str) -> None:
    scores, ranks, cu_groups = prompts(sizes)
    loss, stats = ranking_loss(scores, ranks, cu_groups, ties=ties)
    bounds = cu_groups.tolist()
    losses = [by_hand(scores[a:b].tolist(), ranks[a:b].tolist(), ties)
              for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    kept = [x for x in losses if x is not None]
    assert stats.prompts.item() == len(kept)
    assert loss.item() == pytest.approx(sum(kept) / len(kept) if kept else 0.0, rel=1e-12)
    assert stats.ranking_loss.item() == pytest.approx(sum(kept), rel=1e-12)


def test_pairwise_data_is_k_two() -> None:
    scores = torch.tensor([0.2, 1.0], dtype=torch.float64)
    loss, _ = ranking_loss(scores, torch.tensor([1, 0]), torch.tensor([0, 2]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.8)))


def test_statistics() -> None:
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 2.0])
    ranks = torch.tensor([0, 1, 2, 0, 1])
    _, stats = ranking_loss(scores, ranks, torch.tensor([0, 3, 5]))
    # Prompt 1: two right, one tied in score. Prompt 2: wrong by 2.
    assert stats.count.item() == 4 and stats.correct.item() == 2
    assert stats.correct_or_tied.item() == 2.5 and stats.margin.item() == 1 + 1 + 0 - 2
    total = stats + stats
    assert total.count.item() == 8 and total.prompts.item() == 4


@pytest.mark.parametrize("ties", ["kept_pairs", "all_pairs"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_split_gives_the_same_loss_and_gradient(
    dtype: torch.dtype, tolerance: float, ties: str
) -> None:
    sizes = [4, 2, 9, 3, 5, 6]
    scores, ranks, cu_groups = prompts(sizes, dtype)
    whole, _ = ranking_loss(scores, ranks, cu_groups, ties=ties, denominator=6)
    (expected,) = torch.autograd.grad(whole, scores)
    parts = []
    for first, last in ((0, 1), (1, 4), (4, 6)):
        a, b = int(cu_groups[first]), int(cu_groups[last])
        parts.append(ranking_loss(scores[a:b], ranks[a:b], cu_groups[first:last + 1] - a,
                                  ties=ties, denominator=6)[0])
    (gradient,) = torch.autograd.grad(sum(parts), scores)
    assert (sum(parts) - whole).abs() <= tolerance * whole.abs()
    assert (gradient - expected).norm() <= tolerance * expected.norm()


def test_nothing_to_compare() -> None:
    scores = torch.randn(5, requires_grad=True)
    loss, stats = ranking_loss(scores, torch.zeros(5, dtype=torch.int64), torch.tensor([0, 2, 5]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros(5))
    assert stats.count.item() == stats.prompts.item() == 0


def test_extreme_scores_stay_finite() -> None:
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss, _ = ranking_loss(scores, torch.tensor([0, 1]), torch.tensor([0, 2]))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == 2e4 and gradient.tolist() == [-1.0, 1.0]


def test_gradcheck() -> None:
    scores, ranks, cu_groups = prompts([4, 3, 2])
    for ties in ("kept_pairs", "all_pairs"):
        assert torch.autograd.gradcheck(
            lambda s, t=ties: ranking_loss(s, ranks, cu_groups, ties=t)[0], scores)


def test_bad_input() -> None:
    scores, ranks, bounds = torch.ones(3), torch.arange(3), torch.tensor([0, 3])
    with pytest.raises(ShapeError, match=r"scores \[3\], ranks \[2\]"):
        ranking_loss(scores, ranks[:2], bounds)
    with pytest.raises(ShapeError, match="ranks to be int64"):
        ranking_loss(scores, ranks.float(), bounds)
    with pytest.raises(ShapeError, match=r"cu_groups \[B\+1\] with B at least 1"):
        ranking_loss(scores, ranks, torch.tensor([0]))
    with pytest.raises(ConfigError, match="ties kept_pairs or all_pairs, got 'dropped'"):
        ranking_loss(scores, ranks, bounds, ties="dropped")
    with pytest.raises(ConfigError, match="denominator above 0"):
        ranking_loss(scores, ranks, bounds, denominator=0)
