"""Win rates, fluency and KL, against numbers worked out by hand."""

import copy
import math
from collections.abc import Sequence

import pytest
import torch

from fastrl.config import SamplingConfig
from fastrl.errors import ConfigError, DataError, ShapeError
from fastrl.evaluation import (
    compare_models,
    distinct_word_ratio,
    entropy_bits,
    generate_for,
    language_model_loss,
    response_loglikelihood,
    sequence_kl,
    win_probability,
    win_rate,
)
from fastrl.models.causal_lm import CausalLM
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.models.scoring import response_logprobs
from fastrl.types import Rollout, TokenExample


class LetterCodec:
    """Token 1 ends a text, every other token is a word of one letter."""

    eos_token_ids = (1,)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(chr(ord("a") + t) for t in ids)


def tiny(seed: int = 0) -> CausalLM:
    return new_decoder(DecoderConfig(
        family="llama", vocab_size=11, hidden_size=16, num_layers=1, num_heads=2,
        num_kv_heads=1, head_dim=8, rotary_dim=8, intermediate_size=24, max_positions=32,
        initializer_range=0.4, eos_token_ids=(1,)), seed=seed)


PROMPTS = [[2, 3], [4], [5, 6, 7], [8]]
SAMPLING = SamplingConfig(max_new_tokens=6)


def test_win_rate_counts_ties_one_half() -> None:
    win = win_rate(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([0.0, 1.0, 3.0, 1.0]))
    assert (win.rate, win.num_prompts, win.num_ties) == (0.625, 4, 1)
    assert win_rate(torch.zeros(5), torch.zeros(5)).rate == 0.5


def test_win_rate_interval_is_wilsons() -> None:
    # 8 wins of 10: the textbook interval is 0.4901625 to 0.9433178.
    a = torch.tensor([1.0] * 8 + [0.0] * 2)
    win = win_rate(a, torch.full((10,), 0.5))
    assert (win.low, win.high) == (pytest.approx(0.4901625, abs=1e-6),
                                   pytest.approx(0.9433178, abs=1e-6))
    everything = win_rate(torch.ones(10), torch.zeros(10))
    assert everything.high == pytest.approx(1.0) and everything.low == pytest.approx(0.7224672,
                                                                                    abs=1e-6)


def test_win_rate_interval_is_over_prompts_not_samples() -> None:
    a, b = torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.full((2, 2), 0.5)
    win = win_rate(a, b)
    assert (win.rate, win.num_prompts) == (0.75, 2)


def test_win_rate_refuses_other_shapes() -> None:
    with pytest.raises(ShapeError, match="one shape"):
        win_rate(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ShapeError, match="not empty"):
        win_rate(torch.zeros(0), torch.zeros(0))


def test_distinct_word_ratio() -> None:
    assert distinct_word_ratio(["good good dog", "a cat"]) == pytest.approx((2 / 3 + 1) / 2)
    assert distinct_word_ratio(["The the"]) == 0.5
    assert distinct_word_ratio(["", "   "]) == 0.0


def test_sequence_kl_is_the_mean_of_sums() -> None:
    # k1 of the specification's example: .2 - .1 + .4 = .5; second response: .1.
    logprobs = torch.tensor([[-1.0, -2.0, -0.5], [-1.0, 0.0, 0.0]])
    ref_logprobs = torch.tensor([[-1.2, -1.9, -0.9], [-1.1, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    kl = sequence_kl(logprobs, ref_logprobs, mask)
    assert kl.k1 == pytest.approx(0.3, abs=1e-6)
    assert kl.k1_std_error == pytest.approx(math.sqrt(0.08) / math.sqrt(2), abs=1e-6)
    third = math.exp(-0.1) - 1 + 0.1
    assert kl.k3 == pytest.approx((0.01873075 + 0.00517092 + 0.07032005 + third) / 2, abs=1e-6)


def test_language_model_loss_is_the_token_mean() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    windows = [TokenExample((2, 3, 4), (False, True, True)), TokenExample((5, 6), (False, True))]
    assert language_model_loss(model, windows) == pytest.approx(math.log(11), abs=1e-5)
    with pytest.raises(DataError, match="target token"):
        language_model_loss(model, [TokenExample((2, 3), (False, False))])


def test_generate_for_repeats_itself_and_leaves_the_model_as_it_was() -> None:
    model = tiny()
    model.train()
    first = generate_for(model, PROMPTS, SAMPLING, seed=3)
    second = generate_for(model, PROMPTS, SAMPLING, seed=3)
    assert model.training
    assert torch.equal(first.response_ids, second.response_ids)
    other = generate_for(model, PROMPTS, SAMPLING, seed=4)
    assert other.response_ids.tolist() != first.response_ids.tolist()
    with pytest.raises(DataError, match="at least one prompt"):
        generate_for(model, [], SAMPLING)


def test_likelihood_of_own_samples_is_the_samplers() -> None:
    model = tiny()
    rollout = generate_for(model, PROMPTS, SAMPLING, seed=0)
    expected = float(rollout.rollout_logprobs.sum() / rollout.response_mask.sum())
    assert response_loglikelihood(model, rollout) == pytest.approx(expected, abs=1e-5)


def mean_token(rollout: Rollout) -> torch.Tensor:
    """A score with few ties: the mean token of the response."""
    return rollout.response_ids.sum(dim=1) / rollout.response_mask.sum(dim=1)


def test_equal_models_tie_everywhere() -> None:
    model = tiny()
    result = compare_models(model, copy.deepcopy(model), PROMPTS, mean_token, SAMPLING,
                            LetterCodec(), seed=5)
    assert result.win.rate == 0.5 and result.win.num_ties == len(PROMPTS)
    assert result.kl.k1 == pytest.approx(0.0, abs=1e-4)
    assert result.loglikelihood == result.baseline_loglikelihood
    assert result.distinct_word_ratio == result.baseline_distinct_word_ratio


def test_comparison_takes_kl_and_likelihood_under_the_baseline() -> None:
    model, baseline = tiny(0), tiny(1)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    sampling = SamplingConfig(max_new_tokens=6, temperature=0.7)
    result = compare_models(model, baseline, PROMPTS, mean_token, sampling, LetterCodec(),
                            seed=5, num_samples_per_prompt=3)
    rollout = generate_for(model, PROMPTS, sampling, seed=5, num_samples_per_prompt=3)
    other = generate_for(baseline, PROMPTS, sampling, seed=5, num_samples_per_prompt=3)
    assert result.win.num_prompts == len(PROMPTS)
    assert result.score_mean == pytest.approx(float(mean_token(rollout).mean()))
    assert result.baseline_score_mean == pytest.approx(float(mean_token(other).mean()))
    ref_logprobs, _ = response_logprobs(baseline, rollout, 0.7, 8192)
    kl = (rollout.rollout_logprobs - ref_logprobs).sum(dim=1).mean()
    assert result.kl.k1 == pytest.approx(float(kl), abs=1e-4)
    cold, _ = response_logprobs(baseline, rollout, 1.0, 8192)
    assert result.loglikelihood == pytest.approx(
        float(cold.sum() / rollout.response_mask.sum()), abs=1e-4)
    assert result.response_length == pytest.approx(float(rollout.response_lens.float().mean()))
    stopped = [r == "stop" for r in rollout.finish_reasons]
    assert result.eos_rate == sum(stopped) / len(stopped)


def test_win_probability_and_entropy_golden_values(golden):
    assert win_probability(1.0) == pytest.approx(golden.SIGMOID_ONE, abs=1e-6)
    assert win_probability(-1000.0) == 0 and win_probability(0.0) == 0.5
    assert {p: entropy_bits((p, 1 - p)) for p in golden.ENTROPY_BITS} == pytest.approx(
        golden.ENTROPY_BITS, abs=1e-6)
    assert entropy_bits((3.0, 3.0)) == 1 and entropy_bits((1.0, 0.0)) == 0
    with pytest.raises(ConfigError, match="sum above 0"):
        entropy_bits((0.0, 0.0))
