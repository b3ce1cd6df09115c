"""Comparing models on held-out prompts: who wins, at what KL, and is the text still fluent.

Win rate alone does not see degeneration: a model can win by repeating one good word. That is why
`ModelComparison` puts KL, the likelihood under the original model and the share of distinct words
beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import ConfigError, DataError, ShapeError
from fastrl.intervals import wilson
from fastrl.models.causal_lm import CausalLM
from fastrl.models.scoring import response_logprobs
from fastrl.ops import kl_estimate
from fastrl.rewards import Scorer, TextDecoder, decode_response
from fastrl.trainers.common import evaluate_token_loss, mode
from fastrl.types import Rollout, TokenExample


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of prompts on which A is better than B, ties counted one half."""

    rate: float
    low: float
    """Lower end of the 95% interval over prompts."""
    high: float
    """Upper end of the 95% interval over prompts."""
    num_prompts: int
    num_ties: int
    """Pairs of responses with equal scores."""


def win_rate(scores_a: Tensor, scores_b: Tensor) -> WinRate:
    """Share of prompts on which A scores higher than B, with Wilson's 95% interval.

    With several samples per prompt, sample j of A meets sample j of B and a prompt counts with the
    mean of its outcomes. The interval is over prompts, not over training seeds. Wilson's formula is
    for outcomes 0 and 1; ties and means have less variance at the same rate, so the interval is
    conservative for them.

    Args:
        scores_a, scores_b: [P] or [P, G] float, P prompts and G samples each.
    Returns:
        The rate, its interval, P and the number of ties.
    Raises:
        ShapeError: when the shapes differ, are not 1-D or 2-D, or are empty.
    Example:
        >>> win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 1.0])).rate
        0.625
    """
    if scores_a.shape != scores_b.shape or scores_a.ndim not in (1, 2) or scores_a.numel() == 0:
        raise ShapeError(
            f"win_rate: expected two tensors of one shape [P] or [P, G], not empty, got "
            f"{tuple(scores_a.shape)} and {tuple(scores_b.shape)}; score the same prompts"
        )
    a, b = scores_a.double(), scores_b.double()
    outcomes = (a > b).double() + 0.5 * (a == b).double()
    per_prompt = outcomes.reshape(len(outcomes), -1).mean(dim=1)
    n, rate = len(per_prompt), float(per_prompt.mean())
    low, high = wilson(rate, n)
    return WinRate(rate, low, high, n, int((a == b).sum()))


def language_model_loss(
    model: CausalLM, windows: Sequence[TokenExample], max_tokens: int = 8192
) -> float:
    """Mean negative log-likelihood of held-out text, nats per token.

    Args:
        model: Any causal language model; evaluated without dropout.
        windows: Text windows; tokens with `loss_mask` True count.
        max_tokens: Token budget of one forward pass; never changes the result.
    Raises:
        DataError: when no token counts.
    """
    if not any(any(window.loss_mask) for window in windows):
        raise DataError(
            f"language_model_loss: expected at least one target token, got none in "
            f"{len(windows)} windows; give held-out text"
        )
    return evaluate_token_loss(model, windows, max_tokens)


def distinct_word_ratio(texts: Sequence[str]) -> float:
    """Distinct words divided by words, mean over the texts that have a word; 0 when none has.

    Words are split at white space and compared in lower case. 1 means that no word occurs twice in
    a text; repetition, the usual sign of over-optimisation, lowers it.

    Example:
        >>> distinct_word_ratio(["good good dog", "a cat"])
        0.8333333333333333
    """
    words = [text.lower().split() for text in texts]
    ratios = [len(set(w)) / len(w) for w in words if w]
    return math.fsum(ratios) / len(ratios) if ratios else 0.0


@dataclass(frozen=True, slots=True)
class SequenceKL:
    """KL(policy || reference) in nats per response, estimated on the policy's own samples."""

    k1: float
    """Mean over responses of the summed log-ratio: unbiased, may be negative by chance."""
    k1_std_error: float
    """Standard error of `k1`."""
    k3: float
    """Mean over responses of the summed k3: unbiased, never negative."""


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> SequenceKL:
    """KL(policy || reference) per response, from samples of the policy.

    Args:
        logprobs: [B, T] float, of the policy that drew the samples.
        ref_logprobs: [B, T] float, of the reference.
        response_mask: [B, T] bool.
    """
    k1, _, k3 = kl_estimate(logprobs.double(), ref_logprobs.double(), response_mask)
    sums = k1.sum(dim=1)
    std_error = float(sums.std(correction=1)) / math.sqrt(len(sums)) if len(sums) > 1 else 0.0
    return SequenceKL(float(sums.mean()), std_error, float(k3.sum(dim=1).mean()))


def response_loglikelihood(model: CausalLM, rollout: Rollout, max_tokens: int = 8192) -> float:
    """Mean log-probability per response token under a model, at temperature 1; nats per token.

    Over samples of another policy it says how natural they look to `model`; compare it with the
    value over the model's own samples. 0 for a rollout without a response token.
    """
    with mode(model, train=False):
        logprobs, _ = response_logprobs(model, rollout, 1.0, max_tokens)
    count = int(rollout.response_mask.sum())
    return float(logprobs.double().sum()) / count if count else 0.0


def generate_for(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    *,
    seed: int = 0,
    num_samples_per_prompt: int = 1,
    engine: EngineConfig | None = None,
) -> Rollout:
    """Responses of a model to encoded prompts, drawn by a fresh engine in eval mode.

    Args:
        model: Any causal language model.
        prompts: Token ids of each prompt.
        sampling: How tokens are drawn; stop strings need an Engine with an encoder instead.
        seed: The same seed and prompts give the same responses.
        num_samples_per_prompt: Responses per prompt.
        engine: Sizes of the engine; None takes the defaults.
    Raises:
        DataError: when there is no prompt.
    """
    if not prompts:
        raise DataError("generate_for: expected at least one prompt, got none")
    with mode(model, train=False):
        return Engine(model, engine or EngineConfig()).generate(
            prompts, sampling, seed=seed, num_samples_per_prompt=num_samples_per_prompt
        )


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """A model against a baseline on the same prompts."""

    win: WinRate
    """The model's wins over the baseline."""
    score_mean: float
    baseline_score_mean: float
    kl: SequenceKL
    """KL(model || baseline) on the model's samples, at the sampling temperature."""
    loglikelihood: float
    """Of the model's samples under the baseline, nats per token."""
    baseline_loglikelihood: float
    """Of the baseline's own samples under the baseline, nats per token."""
    distinct_word_ratio: float
    baseline_distinct_word_ratio: float
    response_length: float
    baseline_response_length: float
    """Tokens, mean over responses."""
    eos_rate: float
    baseline_eos_rate: float
    """Share of responses that stopped by themselves."""


def compare_models(
    model: CausalLM,
    baseline: CausalLM,
    prompts: Sequence[Sequence[int]],
    scorer: Scorer,
    sampling: SamplingConfig,
    decoder: TextDecoder,
    *,
    seed: int = 0,
    num_samples_per_prompt: int = 1,
    engine: EngineConfig | None = None,
    max_tokens: int = 8192,
) -> ModelComparison:
    """Sample both models on the same prompts with the same random numbers, and compare.

    Equal models draw equal responses and tie everywhere.

    Args:
        model: The model in question.
        baseline: What it is compared with; also the reference of KL and likelihood.
        prompts: Token ids of each prompt.
        scorer: Decides who wins: `scorer(rollout) -> [B]`.
        sampling: How tokens are drawn, for both. Without truncation, or with raw log-probs: the KL
            compares log-probs of the whole distribution.
        decoder: Decodes responses for the share of distinct words.
        seed: Seeds the samples.
        num_samples_per_prompt: Responses per prompt.
        engine: Sizes of the engine; None takes the defaults.
        max_tokens: Token budget of one scoring pass.
    """
    rollout, baseline_rollout = (
        generate_for(m, prompts, sampling, seed=seed, engine=engine,
                     num_samples_per_prompt=num_samples_per_prompt)
        for m in (model, baseline)
    )
    return compare_rollouts(rollout, baseline_rollout, baseline, scorer, decoder,
                            temperature=sampling.temperature, max_tokens=max_tokens)


def compare_rollouts(
    rollout: Rollout,
    baseline_rollout: Rollout,
    baseline: CausalLM,
    scorer: Scorer,
    decoder: TextDecoder,
    *,
    temperature: float = 1.0,
    max_tokens: int = 8192,
) -> ModelComparison:
    """`compare_models` for responses that are already there, to the same prompts in one order."""
    group = rollout.num_samples_per_prompt
    scores, baseline_scores = scorer(rollout), scorer(baseline_rollout)
    with mode(baseline, train=False):
        ref_logprobs, _ = response_logprobs(baseline, rollout, temperature, max_tokens)
    return ModelComparison(
        win=win_rate(scores.reshape(-1, group), baseline_scores.reshape(-1, group)),
        score_mean=float(scores.mean()),
        baseline_score_mean=float(baseline_scores.mean()),
        kl=sequence_kl(rollout.rollout_logprobs, ref_logprobs, rollout.response_mask),
        loglikelihood=response_loglikelihood(baseline, rollout, max_tokens),
        baseline_loglikelihood=response_loglikelihood(baseline, baseline_rollout, max_tokens),
        distinct_word_ratio=distinct_word_ratio(_texts(rollout, decoder)),
        baseline_distinct_word_ratio=distinct_word_ratio(_texts(baseline_rollout, decoder)),
        response_length=_mean_length(rollout),
        baseline_response_length=_mean_length(baseline_rollout),
        eos_rate=eos_rate(rollout),
        baseline_eos_rate=eos_rate(baseline_rollout),
    )


def eos_rate(rollout: Rollout) -> float:
    """Share of responses that stopped by themselves."""
    return sum(reason == "stop" for reason in rollout.finish_reasons) / rollout.batch_size


def _texts(rollout: Rollout, decoder: TextDecoder) -> list[str]:
    return [decode_response(rollout, i, decoder) for i in range(rollout.batch_size)]


def _mean_length(rollout: Rollout) -> float:
    return float(rollout.response_lens.to(torch.float64).mean())


def win_probability(score_difference: float) -> float:
    """Chance that a response wins whose preference-model score is higher by `score_difference`.

        1 / (1 + exp(-difference)); one unit is 400 / ln 10 = 173.7 Elo

    Source: Askell et al. 2021 (arXiv 2112.00861), section 2.
    """
    return float(torch.sigmoid(torch.tensor(score_difference, dtype=torch.float64)))


def entropy_bits(probabilities: Sequence[float]) -> float:
    """Entropy of two or more choices in bits, after normalising; 1 is an unbiased pair.

        H = -sum_i P_i log2 P_i

    Args:
        probabilities: Not negative, with a sum above 0; they need not add up to 1.
    Source: Ouyang et al. 2022 (arXiv 2203.02155), appendix D: bias of sentence pairs.
    """
    total = math.fsum(probabilities)
    if total <= 0 or min(probabilities) < 0:
        raise ConfigError(f"entropy_bits: expected probabilities of at least 0 with a sum above 0, "
                          f"got {list(probabilities)}; change them")
    return -math.fsum(p / total * math.log2(p / total) for p in probabilities if p > 0)
