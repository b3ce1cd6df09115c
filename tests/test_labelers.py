"""Gold scores, noisy rankings and their limits."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

from fastrl.errors import ConfigError, DataError, ShapeError
from fastrl.labelers import (
    Response,
    find_labeler,
    fit_noise_scale,
    pair_agreement,
    rank_with_noise,
)
from fastrl.lexicon import NEGATIVE, POSITIVE, count_lexicon, score_lexicon
from fastrl.types import Prompt

GOLD = torch.tensor([[0.0, 1.0, 1.0], [2.0, 0.0, -1.0]])


@pytest.mark.parametrize("text, score", [
    ("", 0.0),
    ("Lily was happy and kind.", 2.0),
    ("Lily was happy, happy, so happily happy!", 1.0),  # a family counts once
    ("He was SAD. The monster cried.", -3.0),
    ("happy but sad", 0.0),
    ("unhappy madness goodbye", 0.0),  # whole words only
])
def test_lexicon_counts_distinct_word_families(text, score):
    assert score_lexicon(text, 64) == score


def test_lexicon_divides_by_the_slots_and_not_by_the_words():
    assert score_lexicon("happy and kind", 32) == 4.0
    assert score_lexicon("happy and kind" + " the" * 50, 32) == 4.0


@pytest.mark.parametrize("text, score", [
    ("Lily was happy and kind.", 2.0), ("Lily was happy, happy, so happily happy!", 4.0),
    ("He was SAD. The monster cried, cried.", -4.0), ("", 0.0)])
def test_the_flawed_lexicon_pays_for_repetition(text, score):
    assert count_lexicon(text, 64) == score and count_lexicon(text, 32) == 2 * score
    response = Response(prompt=Prompt(token_ids=(1,), text="Once"), text=text, has_stopped=False,
                        max_new_tokens=64)
    assert find_labeler("lexicon_repeats")(response) == score


def test_lexicon_lists_share_no_word():
    words = [word for family in (*POSITIVE, *NEGATIVE) for word in family.split()]
    assert len(words) == len(set(words))
    assert len(POSITIVE) == 41 and len(NEGATIVE) == 42


def test_labelers_are_found_by_name():
    prompt = Prompt(token_ids=(1,), text="Once")
    response = Response(prompt=prompt, text="a happy dog", has_stopped=False, max_new_tokens=64)
    assert find_labeler("lexicon")(response) == 1.0
    with pytest.raises(ConfigError, match="unknown key 'lexicn'; did you mean 'lexicon'"):
        find_labeler("lexicn")


def test_agreement_and_bayes_limit_by_hand():
    # gaps 1, 1, 0 and 2, 3, 1 at scale 1
    sigmoid = {d: 1 / (1 + math.exp(-d)) for d in (1, 2, 3)}
    agreement = (3 * sigmoid[1] + sigmoid[2] + sigmoid[3]) / 5
    assert pair_agreement(GOLD, 1.0, count_ties=False) == pytest.approx(agreement, abs=1e-12)
    assert pair_agreement(GOLD, 1.0, count_ties=True) == pytest.approx(
        (5 * agreement + 0.5) / 6, abs=1e-12)
    assert pair_agreement(GOLD, 0.0, count_ties=False) == 1.0
    assert pair_agreement(GOLD, 0.0, count_ties=True) == pytest.approx(5.5 / 6)


@pytest.mark.parametrize("target", [0.55, 0.75, 0.99])
def test_noise_scale_gives_the_target_agreement(target):
    scale = fit_noise_scale(GOLD, target)
    assert pair_agreement(GOLD, scale, count_ties=False) == pytest.approx(target, abs=1e-9)


def test_noise_scale_by_hand():
    # One gap of 1: sigmoid(1 / scale) = 0.75 -> scale = 1 / ln 3
    assert fit_noise_scale(torch.tensor([[0.0, 1.0]]), 0.75) == pytest.approx(0.9102392, abs=1e-6)
    assert fit_noise_scale(GOLD, 1.0) == 0.0


def test_noisy_ranks_agree_with_gold_as_often_as_computed():
    gold = torch.tensor([[0.0, 1.0]]).expand(20_000, 2)
    ranks = rank_with_noise(gold, 1.0, seed=3)
    assert set(ranks.flatten().tolist()) == {0, 1}
    share = (ranks[:, 1] == 0).double().mean().item()
    assert share == pytest.approx(0.731059, abs=0.01)  # sigmoid(1), 3 standard errors


def test_without_noise_ranks_are_the_gold_order_with_ties():
    assert rank_with_noise(GOLD, 0.0, seed=0).tolist() == [[1, 0, 0], [0, 1, 2]]


def test_noise_follows_the_seed():
    gold = torch.zeros(8, 6)
    assert torch.equal(rank_with_noise(gold, 1.0, 5), rank_with_noise(gold, 1.0, 5))
    assert not torch.equal(rank_with_noise(gold, 1.0, 5), rank_with_noise(gold, 1.0, 6))


def test_labels_that_cannot_be_ranked_are_refused():
    with pytest.raises(DataError, match="every pair of completions has the same gold score"):
        fit_noise_scale(torch.zeros(3, 4), 0.75)
    with pytest.raises(ShapeError, match=r"got \[3, 1\]"):
        pair_agreement(torch.zeros(3, 1), 1.0, count_ties=True)
    with pytest.raises(ConfigError, match="target_agreement"):
        fit_noise_scale(GOLD, 0.5)


def test_example_learns_close_to_the_bayes_limit(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples/reward_tiny.py"), run_name="__main__")
    printed = capsys.readouterr().out
    accuracy, limit = map(float, re.search(r"accuracy ([\d.]+), Bayes limit ([\d.]+)", printed
                                           ).groups())
    assert limit - 0.08 < accuracy < limit + 0.05
    first, middle, last = map(float, printed.split(":")[-1].split(","))
    assert first < middle < last
