"""Best-of-n sampling: what it gains, how far it moves, and which samples it keeps.

P prompts, N samples each; the best of n <= N of them is the one with the highest score.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n sampling from the policy sampled, in nats; exact for distinct scores.

        KL = log n - (n - 1) / n

    Source: Stiennon et al. 2020 (arXiv 2009.01325), appendix G.3.
    """
    if n < 1:
        raise ConfigError(f"best_of_n_kl: expected n of at least 1, got {n}; change n")
    return math.log(n) - (n - 1) / n


def measured_best_of_n_kl(scores: Tensor, n: int) -> Tensor:
    """KL of best-of-n from the policy sampled, in nats, where scores tie: at most the formula's.

    With F the distribution of a prompt's scores, best-of-n draws a score s that has probability
    p(s) = F(s) - F(s-) with probability F(s)^n - F(s-)^n, and then one of the responses of that
    score as the policy would. Hence

        KL = sum_s (F(s)^n - F(s-)^n) log((F(s)^n - F(s-)^n) / p(s))

    over tied scores, and the integral of n u^(n-1) log(n u^(n-1)) over the range of u = F that
    scores without a tie cover; over 0 to 1 that is log n - (n-1)/n. F is that of the samples, so
    the estimate has an error that shrinks with N; a score seen once counts as never tied.

    Args:
        scores: [P, N] float.
        n: From 1 to N.
    Returns:
        kl: [P] float64, from 0 to `best_of_n_kl(n)`.
    Raises:
        ShapeError: when scores are not [P, N] with N of at least n.
        ConfigError: when n is below 1.
    Example:
        >>> scores = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
        >>> [round(kl, 4) for kl in measured_best_of_n_kl(scores, 4).tolist()]
        [0.6363, 0.0]
    """
    _check(scores, n)
    return torch.tensor([_kl_of_row(row, n) for row in scores.tolist()], dtype=torch.float64)


def _kl_of_row(scores: Sequence[float], n: int) -> float:
    """The KL of one prompt's scores."""
    def below(u: float) -> float:
        """Integral of n v^(n-1) log(n v^(n-1)) from 0 to u."""
        return u**n * (math.log(n) + (n - 1) * math.log(u) - (n - 1) / n) if u > 0 else 0.0

    total, num_below = 0.0, 0
    for score in sorted(set(scores)):
        count = scores.count(score)
        low, high = num_below / len(scores), (num_below + count) / len(scores)
        if count == 1:
            total += below(high) - below(low)
        else:
            mass = high**n - low**n
            total += mass * math.log(mass / (high - low)) if mass > 0 else 0.0
        num_below += count
    return max(0.0, total)


def best_of_n_mean(scores: Tensor, n: int, values: Tensor | None = None) -> float:
    """Mean of the best of n, over all ways to choose n of the N samples: no bias, little noise.

        mean over prompts of sum_i C(i-1, n-1) / C(N, n) v_(i), in the order of the scores

    Args:
        scores: [P, N] float; decide which is best.
        n: From 1 to N.
        values: [P, N] float, what the mean is of, such as gold scores; None: the scores.
    Raises:
        ShapeError: when the shapes do not fit.
        ConfigError: when n is below 1.
    Source: Nakano et al. 2021 (arXiv 2112.09332), appendix I.
    Example:
        >>> best_of_n_mean(torch.tensor([[1.0, 2.0, 3.0]]), 2)
        2.6666666666666665
    """
    _check(scores, n)
    values = scores if values is None else values
    if values.shape != scores.shape:
        raise ShapeError(f"best_of_n_mean: expected values of the scores' shape "
                         f"{tuple(scores.shape)}, got {tuple(values.shape)}")
    count = scores.shape[1]
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)],
                           dtype=torch.float64)
    ordered = values.double().cpu().gather(1, scores.cpu().argsort(dim=1, stable=True))
    return float((ordered * weights).sum(dim=1).mean())


def best_of_n_table(scores: Tensor, gold: Tensor | None = None) -> list[dict[str, Any]]:
    """What best-of-n gains at n = 1, 2, 4, ... and N, as plain rows.

    Args:
        scores: [P, N] float; decide which is best.
        gold: [P, N] float, what is wanted; None: not measured.
    Returns:
        Rows of n, score_mean, kl_bound (the formula), kl (measured) and, with gold, gold_mean.
    """
    count = scores.shape[1]
    sizes = sorted({1 << k for k in range(count.bit_length())} | {count})
    return [{
        "n": n, "score_mean": best_of_n_mean(scores, n), "kl_bound": best_of_n_kl(n),
        "kl": float(measured_best_of_n_kl(scores, n).mean()),
        **({} if gold is None else {"gold_mean": best_of_n_mean(scores, n, gold)}),
    } for n in sizes]


def kept_samples(
    scores: Tensor, num_kept: int, threshold: float | None = None, allowed: Tensor | None = None,
) -> list[list[int]]:
    """The samples of each prompt that rejection sampling keeps, best first; ties in given order.

    Args:
        scores: [P, N] float.
        num_kept: Most of a prompt.
        threshold: Lowest score that is kept; None: any.
        allowed: [P, N] bool, samples that may be kept; None: all.
    Returns:
        P lists of indices into N; empty where no sample is good enough.
    """
    kept = []
    for p, row in enumerate(scores.tolist()):
        good = [i for i, score in enumerate(row)
                if (threshold is None or score >= threshold)
                and (allowed is None or bool(allowed[p, i]))]
        kept.append(sorted(good, key=lambda i: -row[i])[:num_kept])
    return kept


def _check(scores: Tensor, n: int) -> None:
    if n < 1:
        raise ConfigError(f"best of n: expected n of at least 1, got {n}; change n")
    if scores.ndim != 2 or scores.shape[0] == 0 or scores.shape[1] < n:
        raise ShapeError(f"best of n: expected scores [P, N] with P of at least 1 and N of at "
                         f"least {n}, got {tuple(scores.shape)}; draw more samples per prompt")
