"""Rankings as reward models and DPO take them: what can be learned from, and its token lists."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastrl.errors import DataError
from fastrl.trainers.common import require_rows
from fastrl.trainers.reward_report import has_pair
from fastrl.types import Comparison

logger = logging.getLogger("fastrl")


def comparison_sequences(comparison: Comparison) -> list[tuple[int, ...]]:
    """K token lists: the prompt followed by each completion."""
    return [comparison.prompt_ids + completion for completion in comparison.completions]


def prompted_sequences(
    comparisons: Sequence[Comparison]
) -> tuple[list[tuple[int, ...]], list[int]]:
    """The sequences of all comparisons, and the tokens of the prompt of each."""
    return ([s for c in comparisons for s in comparison_sequences(c)],
            [len(c.prompt_ids) for c in comparisons for _ in c.completions])


def group_lengths(comparisons: Sequence[Comparison], share_prefix: bool = False) -> list[int]:
    """Tokens of all K sequences of each comparison; with `share_prefix` the prompt counts once."""
    return [len(c.prompt_ids) * (1 if share_prefix else len(c.completions))
            + sum(map(len, c.completions)) for c in comparisons]


@dataclass(frozen=True, slots=True)
class UsableRankings:
    """What a trainer can learn from, and what it cannot."""

    comparisons: list[Comparison]
    num_without_pair: int
    """Dropped: no two completions differ in rank."""
    num_too_long: int
    """Dropped: a completion leaves no room for a prompt."""
    num_truncated: int
    """Kept, without the beginning of the prompt."""


def usable_rankings(
    stage: str, comparisons: Sequence[Comparison], max_tokens: int
) -> UsableRankings:
    """The rankings that have a pair of different ranks and fit, counted and logged.

    Raises:
        DataError: when none is left.
    """
    with_pair = [c for c in comparisons if has_pair(c)]
    fitting, num_truncated = fit_comparisons(with_pair, max_tokens)
    require_rows(fitting, "rankings with a pair of different ranks")
    usable = UsableRankings(fitting, len(comparisons) - len(with_pair),
                            len(with_pair) - len(fitting), num_truncated)
    logger.info("%s: %d rankings; dropped %d without a pair and %d that are too long; %d lost the "
                "beginning of the prompt", stage, len(fitting), usable.num_without_pair,
                usable.num_too_long, num_truncated)
    return usable


def fit_comparisons(
    comparisons: Sequence[Comparison], max_tokens: int
) -> tuple[list[Comparison], int]:
    """Cut the beginning of prompts so that every prompt + completion has at most `max_tokens`.

    All completions of a prompt see the same prompt. Where the longest completion leaves no room for
    a prompt token, the comparison is left out.

    Returns:
        The comparisons that remain, and how many of them were cut.
    """
    kept, num_cut = [], 0
    for c in comparisons:
        room = max_tokens - max(map(len, c.completions))
        if room >= len(c.prompt_ids):
            kept.append(c)
        elif room > 0:
            kept.append(replace(c, prompt_ids=c.prompt_ids[-room:]))
            num_cut += 1
    return kept, num_cut


def check_comparison(comparison: Comparison, index: int) -> None:
    """Raise DataError unless ranks fit completions and there is something to read."""
    if len(comparison.ranks) != len(comparison.completions) or not comparison.ranks:
        raise DataError(f"comparison {index}: expected one rank for each of at least one "
                        f"completion, got {len(comparison.ranks)} ranks for "
                        f"{len(comparison.completions)} completions; rebuild the comparison")
    if not comparison.prompt_ids:
        raise DataError(f"comparison {index}: expected a prompt of at least one token, got none; "
                        "begin prompts with a beginning-of-text token")
