"""Group advantages against the specification's literal numbers."""

import pytest
import torch

from fastrl.advantages import grpo, rloo
from fastrl.errors import ShapeError


def test_grpo_golden_values(golden):
    scores = torch.tensor([golden.GROUP_SCORES], dtype=torch.float64)
    assert grpo(scores)[0].tolist() == pytest.approx(golden.GRPO_POPULATION_STD, abs=1e-6)
    assert grpo(scores, correction=1)[0].tolist() == pytest.approx(golden.GRPO_SAMPLE_STD, abs=1e-6)


def test_without_the_spread_the_group_mean_is_all_that_is_taken_away():
    scores = torch.tensor([[1.0, 0.0, 0.5, -0.5], [2.0, 2.0, 6.0, 2.0]])
    assert grpo(scores, normalize_by_std=False).tolist() == [
        [0.75, -0.25, 0.25, -0.75], [-1.0, -1.0, 3.0, -1.0]]


def test_rloo_golden_values(golden):
    assert rloo(torch.tensor([golden.GROUP_SCORES]))[0].tolist() == pytest.approx(golden.RLOO)


def test_equal_scores_have_no_advantage():
    scores = torch.full((2, 3), 0.7)
    assert torch.equal(grpo(scores), torch.zeros(2, 3))
    assert torch.allclose(rloo(scores), torch.zeros(2, 3), atol=1e-7)


@pytest.mark.parametrize("rule", [grpo, rloo])
@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_a_group_needs_two_responses(rule, shape):
    with pytest.raises(ShapeError, match="G of at least 2"):
        rule(torch.zeros(shape))
