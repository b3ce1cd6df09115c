"""Evaluations of several seeds as one: means over seeds, with intervals over seeds and prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastrl.errors import ConfigError
from fastrl.intervals import Pooled, mean_over_seeds, rate_over_seeds


@dataclass(frozen=True, slots=True)
class PooledWins:
    """How often a model beats its opponent, over seeds, and how far it is from the reference."""

    model: str
    opponent: str
    rate: Pooled
    kl: Pooled
    """Nats per response, k1."""
    facts: Mapping[str, float]
    """Means over seeds of every other number that the evaluations know of the model."""


def pool_evaluations(evaluations: Sequence[Mapping[str, Any]]) -> list[PooledWins]:
    """What the evaluations of all seeds say of each pair, in the order of the first.

    Args:
        evaluations: Contents of `evaluation.json`, at least one; all with the same pairs.
    Raises:
        ConfigError: when they compare different models.
    """
    pairs = [_pairs(evaluation) for evaluation in evaluations]
    if any(other != pairs[0] for other in pairs):
        raise ConfigError(f"pool_evaluations: expected evaluations of the same pairs, got {pairs}")
    pooled = []
    for index, (model, opponent) in enumerate(pairs[0]):
        wins = [evaluation["win_rates"][index] for evaluation in evaluations]
        facts = [evaluation["models"][model] for evaluation in evaluations]
        pooled.append(PooledWins(
            model, opponent,
            rate_over_seeds([win["rate"] for win in wins], [win["num_prompts"] for win in wins]),
            mean_over_seeds([fact["kl"]["k1"] for fact in facts]),
            {name: sum(fact[name] for fact in facts) / len(facts) for name, value in
             facts[0].items() if isinstance(value, float | int)}))
    return pooled


def _pairs(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(win["model"], win["opponent"]) for win in evaluation["win_rates"]]
