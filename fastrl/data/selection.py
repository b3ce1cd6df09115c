"""Which items are used: held-out sets by prompt, and mixtures by source."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from fastrl.config import check
from fastrl.errors import ConfigError
from fastrl.types import Comparison, Prompt, TokenExample

Item = TypeVar("Item", Prompt, Comparison, TokenExample)


def split_by_prompt(items: Sequence[Item], fraction: float, seed: int = 0
                    ) -> tuple[list[Item], list[Item]]:
    """Split items so that equal prompts fall on one side; the order of items is kept.

    Args:
        items: Prompts, comparisons, or examples (whose prompt is what precedes their targets).
        fraction: Share of the distinct prompts that is held out, in [0, 1]; above 0 at least one
            prompt is, and below 1 at least one is not.
        seed: Decides which.
    Returns:
        train, held_out.
    Raises:
        ConfigError: when `fraction` is out of bounds, or there are too few prompts to split.
    """
    check(0 <= fraction <= 1, "fraction", "a number from 0 to 1", fraction)
    order = sorted({_prompt_ids(item) for item in items}, key=lambda ids: _hash(ids, seed))
    count = round(fraction * len(order))
    if 0 < fraction < 1:
        if len(order) < 2:
            raise ConfigError(f"eval_fraction: expected at least 2 different prompts to hold out "
                              f"{fraction} of them, got {len(order)}; use more data or set it to 0")
        count = min(max(count, 1), len(order) - 1)
    held_out = set(order[:count])
    train = [item for item in items if _prompt_ids(item) not in held_out]
    return train, [item for item in items if _prompt_ids(item) in held_out]


def _prompt_ids(item: Prompt | Comparison | TokenExample) -> tuple[int, ...]:
    if isinstance(item, Prompt):
        return item.token_ids
    if isinstance(item, Comparison):
        return item.prompt_ids
    first_target = item.loss_mask.index(True) if True in item.loss_mask else 0
    return item.token_ids[:first_target] if first_target > 1 else item.token_ids


def _hash(ids: tuple[int, ...], seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{ids}".encode(), digest_size=16).digest()


def sample_by_source(items: Sequence[Item], weights: Mapping[str, float], count: int,
                     seed: int = 0) -> list[Item]:
    """Draw items so that sources occur in proportion to their weights.

    Each source is walked in shuffled passes, so nothing repeats before all of it was drawn; the
    numbers of items per source are exact up to rounding.

    Args:
        items: What to draw from.
        weights: Weight of each source, at least 0; sources that are not named are left out.
        count: How many to draw.
        seed: Decides which, and their order.
    Raises:
        ConfigError: when a named source has no items, or no weight is above 0.
    """
    pools: dict[str, list[Item]] = {source: [] for source in weights}
    for item in items:
        if item.source in pools:
            pools[item.source].append(item)
    for source, weight in weights.items():
        check(weight >= 0, f"weights.{source}", "a number of at least 0", weight)
        if weight > 0 and not pools[source]:
            known = ", ".join(sorted({item.source for item in items}))
            raise ConfigError(f"weights: expected sources among {known}, got {source!r}")
    check(sum(weights.values()) > 0, "weights", "a weight above 0", dict(weights))
    generator = random.Random(seed)
    drawn: list[Item] = []
    for source, number in _shares(weights, count).items():
        pool = pools[source]
        passes = -(-number // len(pool)) if number else 0
        walk = [item for _ in range(passes) for item in generator.sample(pool, len(pool))]
        drawn += walk[:number]
    generator.shuffle(drawn)
    return drawn


def _shares(weights: Mapping[str, float], count: int) -> dict[str, int]:
    """`count` in whole numbers proportional to the weights; largest remainders are rounded up."""
    total = sum(weights.values())
    exact = {source: count * weight / total for source, weight in weights.items()}
    shares = {source: int(value) for source, value in exact.items()}
    by_remainder = sorted(exact, key=lambda source: shares[source] - exact[source])
    for source in by_remainder[:count - sum(shares.values())]:
        shares[source] += 1
    return shares
