"""Programmatic labelers: a gold score with known preferences, and noise that plays the human.

A labeler ranks completions by `gold + scale * Gumbel`, which draws orders from the Plackett-Luce
model: two completions whose gold scores differ by d are put in gold order with probability
sigmoid(d / scale). Agreement and the best accuracy anybody can reach on such labels (the Bayes
limit) therefore follow from the gold scores without sampling.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl import world
from fastrl.errors import ConfigError, DataError, ShapeError
from fastrl.lexicon import count_lexicon, score_lexicon
from fastrl.rewards import TextDecoder, decode_response
from fastrl.types import Prompt, Rollout
from fastrl.yaml_file import unknown_key


@dataclass(frozen=True, slots=True)
class Response:
    """A finished response, as a gold score reads it."""

    prompt: Prompt
    text: str
    """The response alone, decoded."""
    has_stopped: bool
    """True when it ended itself; False when it ran into `max_new_tokens`."""
    max_new_tokens: int
    """Tokens it was allowed to have."""


GoldScore = Callable[[Response], float]


def _lexicon(response: Response) -> float:
    """Happy stories win: see `fastrl.lexicon`."""
    return score_lexicon(response.text, response.max_new_tokens)


def _lexicon_repeats(response: Response) -> float:
    """The lexicon with the flaw that repetition pays, for studies of reward hacking."""
    return count_lexicon(response.text, response.max_new_tokens)


def _world(response: Response) -> float:
    """Right and polite answers win: see `fastrl.world`."""
    return world.gold_score(response.prompt.text, response.text, response.has_stopped)


LABELERS: dict[str, GoldScore] = {
    "lexicon": _lexicon, "lexicon_repeats": _lexicon_repeats, "world": _world}
"""Gold scores by the name that recipes use."""


def find_labeler(name: str) -> GoldScore:
    """Return the gold score of that name.

    Raises:
        ConfigError: when there is none; names the nearest.
    """
    if name not in LABELERS:
        raise ConfigError(unknown_key(name, LABELERS, "labeler"))
    return LABELERS[name]


def score_responses(gold: GoldScore, rollout: Rollout, prompts: Sequence[Prompt],
                    decoder: TextDecoder, max_new_tokens: int) -> Tensor:
    """Return the gold score [B] float64 of every response of a rollout.

    Args:
        gold: The score.
        rollout: Responses, `num_samples_per_prompt` for each prompt.
        prompts: The prompts in the order of the request.
        decoder: Turns responses into text.
        max_new_tokens: Tokens that each response was allowed to have.
    """
    group = rollout.num_samples_per_prompt
    return torch.tensor([
        gold(Response(prompt=prompts[index // group],
                      text=decode_response(rollout, index, decoder),
                      has_stopped=reason == "stop", max_new_tokens=max_new_tokens))
        for index, reason in enumerate(rollout.finish_reasons)], dtype=torch.float64)


class LabelerScorer:
    """A gold score as a scorer.

    Args:
        gold: The score.
        encoder: Turns responses into text.
        prompts: Every prompt that will be answered.
        max_new_tokens: Tokens that each response is allowed to have.
    """

    def __init__(self, gold: GoldScore, encoder: TextDecoder, prompts: Iterable[Prompt],
                 max_new_tokens: int) -> None:
        self.gold, self.encoder, self.max_new_tokens = gold, encoder, max_new_tokens
        self._prompts = {prompt.token_ids: prompt for prompt in prompts}

    def __call__(self, rollout: Rollout) -> Tensor:
        """Score [B] float32 of every response.

        Raises:
            DataError: when a response answers another prompt.
        """
        prompts = []
        for index in range(0, rollout.batch_size, rollout.num_samples_per_prompt):
            token_ids = tuple(rollout.sequence(index)[: int(rollout.prompt_lens[index])])
            if token_ids not in self._prompts:
                raise DataError(f"labeler: expected one of {len(self._prompts)} known prompts, got "
                                f"{self.encoder.decode(token_ids)[:200]!r}; pass all prompts")
            prompts.append(self._prompts[token_ids])
        scores = score_responses(self.gold, rollout, prompts, self.encoder, self.max_new_tokens)
        return scores.float().to(rollout.response_mask.device)


def pair_agreement(gold: Tensor, noise_scale: float, *, count_ties: bool) -> float:
    """Return the expected share of pairs that noisy labels put in gold order.

        mean over pairs of sigmoid(|gold_i - gold_j| / noise_scale)

    With `count_ties` this is the Bayes limit: nothing can predict noisy labels better than the
    gold order does, and a pair of equal gold is a coin toss (1/2).

    Args:
        gold: [B, K] gold scores of K completions of B prompts.
        noise_scale: Scale of the Gumbel noise; 0 is no noise.
        count_ties: Keep pairs of equal gold, each worth 1/2; else they are left out.
    Raises:
        ShapeError: gold is not [B, K] with K of at least 2.
        DataError: when no pair is left to count.
    """
    gaps = _pair_gaps(gold)
    if not count_ties:
        gaps = gaps[gaps > 0]
    if len(gaps) == 0:
        raise DataError("labels: every pair of completions has the same gold score, expected some "
                        "to differ; use other prompts, more samples or another labeler")
    if noise_scale == 0:
        return float(torch.where(gaps > 0, 1.0, 0.5).mean())
    return float(torch.sigmoid(gaps / noise_scale).mean())


def fit_noise_scale(gold: Tensor, target_agreement: float) -> float:
    """Return the Gumbel scale at which `pair_agreement` without ties is `target_agreement`.

    Args:
        gold: [B, K] gold scores.
        target_agreement: Above 0.5 and at most 1; 1 gives scale 0.
    Raises:
        ConfigError: target_agreement is out of bounds.
    """
    if not 0.5 < target_agreement <= 1:
        raise ConfigError(f"target_agreement: expected a share above 0.5 and at most 1, got "
                          f"{target_agreement}; change target_agreement")
    if target_agreement == 1:
        return 0.0
    low, high = 0.0, 1.0
    while pair_agreement(gold, high, count_ties=False) > target_agreement:
        high *= 2
    for _ in range(60):  # halves a double's worth of digits
        middle = (low + high) / 2
        if pair_agreement(gold, middle, count_ties=False) > target_agreement:
            low = middle
        else:
            high = middle
    return high


def rank_with_noise(gold: Tensor, noise_scale: float, seed: int) -> Tensor:
    """Return ranks drawn from the Plackett-Luce model of the gold scores.

    Args:
        gold: [B, K] gold scores.
        noise_scale: Scale of the Gumbel noise; 0 keeps gold order, and equal gold gives ties.
        seed: Seeds the noise.
    Returns:
        ranks: [B, K] int64, 0 is best, dense.
    """
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(gold.shape, generator=generator, dtype=torch.float64)
    gumbel = -(-uniform.clamp_min(1e-300).log()).log()
    noisy = gold.double() + noise_scale * gumbel
    return torch.stack([torch.unique(-row, return_inverse=True)[1] for row in noisy])


def _pair_gaps(gold: Tensor) -> Tensor:
    """|gold_i - gold_j| of every pair of a prompt: [B, K] -> [B * K * (K - 1) / 2] float64."""
    if gold.dim() != 2 or gold.shape[1] < 2:
        raise ShapeError(f"labels: expected gold scores [B, K] with K of at least 2, got "
                         f"{list(gold.shape)}; rank at least two completions per prompt")
    first, second = torch.triu_indices(gold.shape[1], gold.shape[1], offset=1)
    return (gold[:, first] - gold[:, second]).abs().double().flatten()
