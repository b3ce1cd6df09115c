"""DPO against the specification's literal numbers."""

import math

import pytest
import torch

from fastrl.errors import ConfigError, ShapeError
from fastrl.losses import dpo_loss


def pair(golden):
    return [torch.tensor([value], dtype=torch.float64)
            for value in (*golden.DPO_LOGPROBS, *golden.DPO_REF_LOGPROBS)]


def test_golden_value(golden):
    losses, margins = dpo_loss(*pair(golden), dpo_beta=golden.DPO_BETA)
    assert float(losses) == pytest.approx(golden.DPO_LOSS, abs=1e-6)
    assert margins.tolist() == pytest.approx([golden.DPO_MARGIN])


def test_label_smoothing_mixes_both_orders(golden):
    losses, _ = dpo_loss(*pair(golden), dpo_beta=golden.DPO_BETA, label_smoothing=0.1)
    assert float(losses) == pytest.approx(0.9 * 0.620957 + 0.1 * (0.620957 + 0.15), abs=1e-6)


def test_gradient_raises_the_chosen_and_lowers_the_rejected():
    chosen, rejected = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    losses, _ = dpo_loss(chosen, rejected, torch.zeros(2), torch.zeros(2), dpo_beta=0.5)
    losses.mean().backward()
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert chosen.grad.tolist() == [-0.125, -0.125]
    assert rejected.grad.tolist() == [0.125, 0.125]


def test_ipo_pulls_the_log_ratio_to_half_of_one_over_beta(golden):
    losses, margins = dpo_loss(*pair(golden), dpo_beta=golden.DPO_BETA, loss_type="ipo")
    # h = (-10 + 11) - (-12 + 11.5) = 1.5, its target 1 / (2 * 0.1) = 5.
    assert losses.tolist() == pytest.approx([3.5 ** 2])
    assert margins.tolist() == pytest.approx([golden.DPO_MARGIN])


def test_bad_input_is_refused():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ShapeError, match=r"one shape \[B\]"):
        dpo_loss(one, two, one, one)
    with pytest.raises(ConfigError, match="dpo_beta above 0"):
        dpo_loss(one, one, one, one, dpo_beta=0.0)
    with pytest.raises(ConfigError, match="label_smoothing"):
        dpo_loss(one, one, one, one, label_smoothing=0.5)
    with pytest.raises(ConfigError, match="sigmoid, or ipo"):
        dpo_loss(one, one, one, one, loss_type="hinge")
    with pytest.raises(ConfigError, match="ipo without label_smoothing"):
        dpo_loss(one, one, one, one, loss_type="ipo", label_smoothing=0.1)
