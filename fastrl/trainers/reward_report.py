"""How good a reward model is: accuracy, calibration, and what length alone would achieve."""

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

from fastrl.errors import DataError
from fastrl.types import Comparison

MARGIN_EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)
"""Where the bins of the absolute score difference begin, in log-odds."""
NUM_CALIBRATION_BINS = 10
_Z95 = 1.959963984540054
_Key = TypeVar("_Key", str, int)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of pairs ranked as people ranked them, and what a length rule reaches on them."""

    num_prompts: int
    num_pairs: int
    accuracy: float
    """Pairs with equal scores count one half."""
    low: float
    """Lower end of the 95% interval; pairs of one prompt are not independent and count less."""
    high: float
    """Upper end of the 95% interval."""
    longer_accuracy: float
    """Accuracy of "the longer completion is better"; equal lengths count one half."""
    shorter_accuracy: float
    """Accuracy of "the shorter completion is better"."""
    length_rule: str
    """longer or shorter: the better of the two on the training comparisons."""
    length_accuracy: float
    """Accuracy of that rule here: the length-only baseline."""


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Pairs whose predicted probability of the winner lies in one bin."""

    low: float
    high: float
    num_pairs: int
    predicted: float
    """Mean of sigmoid(|score difference|)."""
    observed: float
    """Share of them in which the higher score belongs to the better completion."""


@dataclass(frozen=True, slots=True)
class RewardReport:
    """Evaluation of a reward model on comparisons."""

    loss: float
    """Ranking loss: mean over prompts of the mean over pairs."""
    overall: Accuracy
    by_margin: Mapping[str, Accuracy]
    """Keyed by the bin of the absolute score difference; empty bins are left out."""
    by_completions: Mapping[str, Accuracy]
    """Keyed by K."""
    by_source: Mapping[str, Accuracy]
    """Keyed by the source of the comparison."""
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float
    """Expected calibration error: mean of |predicted - observed| over pairs."""
    score_mean: float
    score_std: float
    """Over all completions; population standard deviation."""
    num_without_pair: int
    """Comparisons left out because all their completions are tied, or there is only one."""
    num_too_long: int = 0
    """Comparisons left out because a completion leaves no room for a prompt."""

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Pair:
    """One pair of a prompt, the better completion first."""

    prompt: int
    margin: float
    length_gap: int
    num_completions: int
    source: str


def has_pair(comparison: Comparison) -> bool:
    """True when at least two completions have different ranks."""
    return len(set(comparison.ranks)) > 1


def build_report(
    comparisons: Sequence[Comparison],
    scores: Sequence[Sequence[float]],
    train: Sequence[Comparison],
) -> RewardReport:
    """Compare scores with human ranks.

    Args:
        comparisons: Held-out comparisons.
        scores: K scores of each comparison.
        train: Training comparisons; the length rule (longer or shorter wins) is fitted on them, for
            each source by itself where training has that source.
    Raises:
        DataError: when no comparison has a pair of different ranks.
    """
    pairs = _pairs(comparisons, scores)
    if not pairs:
        raise DataError(f"reward report: expected a pair of different ranks, got none in "
                        f"{len(comparisons)} comparisons; give held-out comparisons")
    train_pairs = _pairs(train, [[0.0] * len(c.ranks) for c in train])
    rule = _length_rule(train_pairs)
    source_rules = {source: _length_rule(group)
                    for source, group in _group(train_pairs, lambda p: p.source).items()}
    by_margin = _group(sorted(pairs, key=lambda p: abs(p.margin)), _margin_bin)
    by_completions = _group(sorted(pairs, key=lambda p: p.num_completions),
                            lambda p: str(p.num_completions))
    by_source = _group(sorted(pairs, key=lambda p: p.source), lambda p: p.source)
    flat = [value for group in scores for value in group]
    mean = math.fsum(flat) / len(flat)
    calibration = _calibrate(pairs)
    return RewardReport(
        loss=_ranking_loss(pairs),
        overall=_accuracy(pairs, rule),
        by_margin={name: _accuracy(group, rule) for name, group in by_margin.items()},
        by_completions={name: _accuracy(group, rule) for name, group in by_completions.items()},
        by_source={name: _accuracy(group, source_rules.get(name, rule))
                   for name, group in by_source.items()},
        calibration=calibration,
        calibration_error=math.fsum(b.num_pairs * abs(b.predicted - b.observed)
                                    for b in calibration) / len(pairs),
        score_mean=mean,
        score_std=math.sqrt(math.fsum((v - mean) ** 2 for v in flat) / len(flat)),
        num_without_pair=sum(not has_pair(c) for c in comparisons),
    )


def _pairs(comparisons: Sequence[Comparison], scores: Sequence[Sequence[float]]) -> list[_Pair]:
    """Every pair of different ranks of every comparison."""
    pairs = []
    for prompt, (c, values) in enumerate(zip(comparisons, scores, strict=True)):
        lengths = c.num_characters or tuple(len(completion) for completion in c.completions)
        for i, j in combinations(range(len(c.ranks)), 2):
            if c.ranks[i] != c.ranks[j]:
                better, worse = (i, j) if c.ranks[i] < c.ranks[j] else (j, i)
                pairs.append(_Pair(prompt, values[better] - values[worse],
                                   lengths[better] - lengths[worse], len(c.ranks), c.source))
    return pairs


def _group(pairs: Sequence[_Pair], key: Callable[[_Pair], _Key]) -> dict[_Key, list[_Pair]]:
    """Pairs by key, in order of first appearance."""
    groups: dict[_Key, list[_Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    return groups


def _margin_bin(pair: _Pair) -> str:
    """Name of the bin of the absolute score difference."""
    index = bisect_right(MARGIN_EDGES, abs(pair.margin)) - 1
    if index == len(MARGIN_EDGES) - 1:
        return f"{MARGIN_EDGES[index]:g} or more"
    return f"{MARGIN_EDGES[index]:g} to {MARGIN_EDGES[index + 1]:g}"


def _wins(differences: Sequence[float]) -> float:
    """Number of positive differences; zeros count one half."""
    return math.fsum((d > 0) + 0.5 * (d == 0) for d in differences)


def _length_rule(pairs: Sequence[_Pair]) -> str:
    """Which length wins more often in these pairs; longer when there are none."""
    return "longer" if 2 * _wins([p.length_gap for p in pairs]) >= len(pairs) else "shorter"


def _accuracy(pairs: Sequence[_Pair], rule: str) -> Accuracy:
    """Accuracy with its interval, beside the length rules'."""
    n = len(pairs)
    accuracy = _wins([p.margin for p in pairs]) / n
    low, high = _interval(pairs, accuracy)
    longer = _wins([p.length_gap for p in pairs]) / n
    return Accuracy(
        num_prompts=len({p.prompt for p in pairs}), num_pairs=n,
        accuracy=accuracy, low=low, high=high,
        longer_accuracy=longer, shorter_accuracy=1 - longer, length_rule=rule,
        length_accuracy=longer if rule == "longer" else 1 - longer,
    )


def _interval(pairs: Sequence[_Pair], accuracy: float) -> tuple[float, float]:
    """Wilson's 95% interval, with as many independent pairs as the spread over prompts shows.

    The variance of the share is that of a ratio of sums over prompts; pairs of one prompt share
    completions, so it is usually larger than that of independent pairs.
    """
    by_prompt = _group(pairs, lambda p: p.prompt)
    num_prompts, n = len(by_prompt), float(len(pairs))
    residuals = [_wins([p.margin for p in group]) - accuracy * len(group)
                 for group in by_prompt.values()]
    variance = math.fsum(r * r for r in residuals) / n**2
    if num_prompts > 1 and variance > 0:
        variance *= num_prompts / (num_prompts - 1)
        n = min(n, accuracy * (1 - accuracy) / variance)
    else:
        n = num_prompts
    z2 = _Z95**2 / n
    centre = (accuracy + z2 / 2) / (1 + z2)
    half = math.sqrt(z2 * accuracy * (1 - accuracy) + z2**2 / 4) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) for x >= 0."""
    return 1 / (1 + math.exp(-x))


def _calibrate(pairs: Sequence[_Pair]) -> tuple[CalibrationBin, ...]:
    """Predicted against observed share of wins, over equal bins of the prediction in [0.5, 1]."""
    width = 0.5 / NUM_CALIBRATION_BINS
    groups: list[list[_Pair]] = [[] for _ in range(NUM_CALIBRATION_BINS)]
    for pair in pairs:
        index = int((_sigmoid(abs(pair.margin)) - 0.5) / width)
        groups[min(index, NUM_CALIBRATION_BINS - 1)].append(pair)
    return tuple(
        CalibrationBin(
            low=0.5 + i * width, high=0.5 + (i + 1) * width, num_pairs=len(group),
            predicted=math.fsum(_sigmoid(abs(p.margin)) for p in group) / len(group),
            observed=_wins([p.margin for p in group]) / len(group))
        for i, group in enumerate(groups) if group
    )


def _ranking_loss(pairs: Sequence[_Pair]) -> float:
    """Mean over prompts of the mean over pairs of -log sigmoid(margin)."""
    losses = [math.fsum(max(-p.margin, 0) + math.log1p(math.exp(-abs(p.margin))) for p in group)
              / len(group) for group in _group(pairs, lambda p: p.prompt).values()]
    return math.fsum(losses) / len(losses)
