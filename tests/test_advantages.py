"""Group advantages against the specification's literal numbers."""

import pytest
import torch

from fastrl.advantages import (
    dr_grpo,
    gae,
    grpo,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    remax,
    rloo,
)
from fastrl.errors import ShapeError


def test_grpo_golden_values(golden):
    scores = torch.tensor([golden.GROUP_SCORES], dtype=torch.float64)
    assert grpo(scores)[0].tolist() == pytest.approx(golden.GRPO_POPULATION_STD, abs=1e-6)
    assert grpo(scores, correction=1)[0].tolist() == pytest.approx(golden.GRPO_SAMPLE_STD, abs=1e-6)


def test_without_the_spread_the_group_mean_is_all_that_is_taken_away():
    scores = torch.tensor([[1.0, 0.0, 0.5, -0.5], [2.0, 2.0, 6.0, 2.0]])
    expected = [[0.75, -0.25, 0.25, -0.75], [-1.0, -1.0, 3.0, -1.0]]
    assert grpo(scores, normalize_by_std=False).tolist() == expected
    assert dr_grpo(scores).tolist() == expected


def test_rloo_golden_values(golden):
    assert rloo(torch.tensor([golden.GROUP_SCORES]))[0].tolist() == pytest.approx(golden.RLOO)


def test_equal_scores_have_no_advantage():
    scores = torch.full((2, 3), 0.7)
    assert torch.equal(grpo(scores), torch.zeros(2, 3))
    assert torch.allclose(rloo(scores), torch.zeros(2, 3), atol=1e-7)


@pytest.mark.parametrize("rule", [grpo, dr_grpo, rloo])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_group_needs_two_responses(rule, shape):
    with pytest.raises(ShapeError, match="G of at least 2"):
        rule(torch.zeros(shape))


MASK = torch.tensor([[True, True, True], [True, False, False], [True, True, False],
                     [True, True, True]])
REWARDS = torch.tensor([[-0.1, 0.2, 1.0], [0.5, 9.0, 9.0], [0.0, -1.0, 9.0], [0.1, 0.1, 0.1]],
                       dtype=torch.float64)
TO_COME = torch.tensor([[1.1, 1.2, 1.0], [0.5, 0.0, 0.0], [-1.0, -1.0, 0.0], [0.3, 0.2, 0.1]],
                       dtype=torch.float64)


def test_reinforce_plus_plus_by_hand():
    got = reinforce_plus_plus(REWARDS, MASK, whiten_advantages=False)
    torch.testing.assert_close(got, TO_COME)
    discounted = reinforce_plus_plus(REWARDS, MASK, gamma=0.5, whiten_advantages=False)
    assert discounted[0].tolist() == pytest.approx([-0.1 + 0.1 + 0.25, 0.2 + 0.5, 1.0])


def test_whitening_is_over_the_tokens_of_the_whole_batch():
    """Nine tokens: mean 2.4 / 9 by hand, population variance."""
    got = reinforce_plus_plus(REWARDS, MASK)[MASK]
    tokens = TO_COME[MASK]
    assert len(tokens) == 9 and float(tokens.sum()) == pytest.approx(2.4)
    variance = float((tokens - 2.4 / 9).square().sum()) / 9
    torch.testing.assert_close(got, (tokens - 2.4 / 9) / (variance + 1e-8) ** 0.5)


def test_the_baseline_form_takes_the_mean_score_of_the_group_away():
    scores = torch.tensor([[1.0, 0.5], [-1.0, 0.0]], dtype=torch.float64)
    got = reinforce_plus_plus_baseline(REWARDS, scores, MASK, whiten_advantages=False)
    means = torch.tensor([0.75, 0.75, -0.5, -0.5], dtype=torch.float64)[:, None]
    torch.testing.assert_close(got, (TO_COME - means) * MASK)
    whitened = reinforce_plus_plus_baseline(REWARDS, scores, MASK)[MASK]
    assert abs(float(whitened.mean())) < 1e-12
    assert float(whitened.var(correction=0)) == pytest.approx(1.0, abs=1e-6)


def test_remax_takes_the_greedy_score_away():
    got = remax(REWARDS, torch.tensor([0.7, -0.2], dtype=torch.float64), MASK)
    greedy = torch.tensor([0.7, 0.7, -0.2, -0.2], dtype=torch.float64)[:, None]
    torch.testing.assert_close(got, (TO_COME - greedy) * MASK)


def test_gae_of_a_perfect_critic_without_decay_is_reinforce_less_its_values():
    values = torch.randn(4, 3, dtype=torch.float64)
    got, returns = gae(REWARDS, values, MASK, lam=1.0, whiten_advantages=False)
    torch.testing.assert_close(got, (TO_COME - values) * MASK)
    torch.testing.assert_close(returns, TO_COME)


@pytest.mark.parametrize("rule", [grpo, dr_grpo, rloo])
def test_group_rules_are_invariant_where_they_should_be(rule):
    """Sum 0 in each group; a shift of the scores changes nothing; a scale scales, or is undone."""
    torch.manual_seed(0)
    for size in (2, 3, 8):
        scores = torch.randn(5, size, dtype=torch.float64)
        advantages = rule(scores)
        torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(5, dtype=torch.float64))
        torch.testing.assert_close(rule(scores + torch.arange(5)[:, None]), advantages)
        torch.testing.assert_close(rule(3 * scores), (1 if rule is grpo else 3) * advantages,
                                   rtol=1e-6, atol=1e-9)
        order = torch.randperm(size)
        torch.testing.assert_close(rule(scores[:, order]), advantages[:, order])


def test_rloo_is_the_score_over_the_mean_of_the_others():
    scores = torch.randn(3, 4, dtype=torch.float64)
    for i in range(4):
        others = scores[:, [j for j in range(4) if j != i]].mean(dim=1)
        torch.testing.assert_close(rloo(scores)[:, i], scores[:, i] - others)
    torch.testing.assert_close(rloo(scores), 4 / 3 * dr_grpo(scores))


def test_masked_rewards_are_never_read():
    spoiled = REWARDS.masked_fill(~MASK, float("nan"))
    scores, greedy = torch.zeros(2, 2), torch.zeros(2)
    for got in (reinforce_plus_plus(spoiled, MASK), remax(spoiled, greedy, MASK),
                reinforce_plus_plus_baseline(spoiled, scores, MASK)):
        assert got.isfinite().all() and (got[~MASK] == 0).all()


def test_baselines_of_other_shapes_are_refused():
    with pytest.raises(ShapeError, match="P a divisor of 4 responses, got \\[3\\]"):
        remax(REWARDS, torch.zeros(3), MASK)
    with pytest.raises(ShapeError, match="expected scores of 4 responses, .* got 6"):
        reinforce_plus_plus_baseline(REWARDS, torch.zeros(3, 2), MASK)
    with pytest.raises(ShapeError, match="G of at least 2"):
        reinforce_plus_plus_baseline(REWARDS, torch.zeros(4, 1), MASK)
