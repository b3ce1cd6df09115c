"""Scores from reward models, and weighted sums of several scores."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastrl.errors import ConfigError, DataError
from fastrl.models.causal_lm import ScalarModel
from fastrl.models.scoring import response_scores
from fastrl.out_of_memory import PassBudget
from fastrl.types import Prompt, Rollout


class Scorer(Protocol):
    """What a PPO trainer asks for scores."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""


class RewardModelScorer:
    """Scores responses with a reward model: its value at the last token, shift included.

    Args:
        model: Reward model; put into eval mode and frozen, since no one trains it from here on.
        max_tokens: Token budget of one forward pass; never changes the result. Less from then on
            where memory ended in one.
        share_prefix: Encode the prompt of several responses once.
    """

    def __init__(
        self, model: ScalarModel, max_tokens: int = 8192, *, share_prefix: bool = True
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.passes, self.share_prefix = PassBudget(max_tokens), share_prefix

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""
        return response_scores(self.model, rollout, self.passes,
                               share_prefix=self.share_prefix).float()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedScores:
    """One term of a `WeightedScorer`."""

    name: str
    """What its metric is called."""
    scorer: Scorer
    weight: float = 1.0
    """Factor of the scores."""
    source_weights: Mapping[str, float] | None = None
    """Factor for prompts of a source, in place of `weight`."""

    def weight_of(self, source: str) -> float:
        """The factor for prompts of a source."""
        return (self.source_weights or {}).get(source, self.weight)


class WeightedScorer:
    """Scores responses with a weighted sum of several scores.

        score(y) = sum_k weight_k(source of y's prompt) * score_k(y)

    A term sees only the responses for which its weight is not 0, so that a function of a column
    that one source has is not asked about the others.

    Args:
        terms: At least one, with distinct names.
        prompts: Tell the source of a response's prompt; one that is not among them has source "".
    Raises:
        ConfigError: when there is no term, a name is there twice, or weights name a source that no
            prompt has.
        DataError: when equal prompts have different sources that weights tell apart.
    """

    def __init__(self, terms: Sequence[WeightedScores], prompts: Iterable[Prompt] = ()) -> None:
        self.terms = tuple(terms)
        names = [term.name for term in terms]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"rewards: expected at least one term and distinct names, got "
                              f"{names}; add or rename one")
        self.means: dict[str, float] = {}
        """Mean score of each term over the responses that it saw in the last call."""
        self._sources = self._read_sources(prompts)

    def _read_sources(self, prompts: Iterable[Prompt]) -> dict[tuple[int, ...], str]:
        """The source of every prompt by its tokens."""
        sources: dict[tuple[int, ...], str] = {}
        for prompt in prompts:
            other = sources.setdefault(prompt.token_ids, prompt.source)
            if any(t.weight_of(other) != t.weight_of(prompt.source) for t in self.terms):
                raise DataError(
                    f"source_weights: expected equal prompts to have sources of equal weights, got "
                    f"{prompt.text[:80]!r} with {other!r} and {prompt.source!r}; drop one of them")
        known = set(sources.values())
        for term in self.terms:
            unknown = sorted(set(term.source_weights or {}) - known)
            if sources and unknown:
                names = ", ".join(map(repr, sorted(known)))
                raise ConfigError(
                    f"rewards.{term.name}.source_weights: expected sources of the prompts "
                    f"({names}), got {unknown[0]!r}; correct the name")
        return sources

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response."""
        device = rollout.response_mask.device
        sources = [self._source(rollout, i) for i in range(rollout.batch_size)]
        total = torch.zeros(rollout.batch_size, device=device)
        self.means = {}
        for term in self.terms:
            weights = torch.tensor([term.weight_of(source) for source in sources], device=device)
            rows = weights.nonzero()[:, 0]
            if len(rows) == 0:
                continue
            is_all = len(rows) == rollout.batch_size
            scores = term.scorer(rollout if is_all else rollout.select(rows.tolist())).to(device)
            total[rows] += weights[rows] * scores
            self.means[term.name] = float(scores.double().mean())
        return total

    def _source(self, rollout: Rollout, index: int) -> str:
        prompt_ids = rollout.sequence(index)[: int(rollout.prompt_lens[index])]
        return self._sources.get(tuple(prompt_ids), "")


def reward_models(*scorers: Scorer | None) -> dict[str, ScalarModel]:
    """The reward models that scorers ask, each once: "reward model", "reward model 2" and so on."""
    models: dict[int, ScalarModel] = {}
    for scorer in scorers:
        inner = [term.scorer for term in scorer.terms] if isinstance(scorer, WeightedScorer) \
            else [scorer]
        for one in inner:
            if isinstance(one, RewardModelScorer):
                models[id(one.model)] = one.model
    return {f"reward model {number}" if number > 1 else "reward model": model
            for number, model in enumerate(models.values(), start=1)}


def score_metrics(scorer: Scorer, prefix: str = "reward/") -> dict[str, float]:
    """Mean of each term of a weighted sum in its last call, as metrics; none for other scorers."""
    means = scorer.means if isinstance(scorer, WeightedScorer) else {}
    return {f"{prefix}part_{name}_mean": mean for name, mean in means.items()}
