"""policy_loss' Triton entry against the float64 reference; run by test_triton.py.

The kernels are ppo_loss', whose tests say more.
"""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import PolicyStats, policy_loss
from fastrl.ops.policy_loss import policy_loss_reference

FLOOR = 2e-6  # float32's exp, and sums in another order


def inputs(*shape: int) -> list[Tensor]:
    """Log-probs, old ones, advantages, NaN where masked, and the mask."""
    mask = torch.rand(*shape) > 0.3
    old_logprobs, advantages = torch.randn(2, *shape)
    logprobs = old_logprobs + 0.3 * torch.randn(*shape)
    return [*(x.masked_fill(~mask, torch.nan) for x in (logprobs, old_logprobs, advantages)), mask]


def run(function: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, PolicyStats]:
    leaf = tensors[0].detach().requires_grad_()
    loss, stats = function(leaf, *tensors[1:], **options)
    (3 * loss).backward()
    return loss, leaf.grad, stats


@pytest.mark.parametrize("shape", [(1,), (3, 700)])
@pytest.mark.parametrize("options", [{}, {"denominator": 9.0, "clip_range": 0.1}])
def test_as_good_as_torch(shape: tuple[int, ...], options: dict[str, float]) -> None:
    tensors = inputs(*shape)
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    truth = run(policy_loss_reference, *wide, **options)
    plain = run(policy_loss_reference, *tensors, **options)
    ours = run(policy_loss, *tensors, **options, backend="triton")
    for i in range(2):
        error, torch_error = ((x[i] - truth[i]).abs().max() for x in (ours, plain))
        assert error <= 2 * torch_error + FLOOR * (truth[i].abs().max() + 1e-30)
    for field in fields(PolicyStats):
        torch.testing.assert_close(getattr(ours[2], field.name), getattr(truth[2], field.name),
                                   rtol=1e-5, atol=1e-5)


def test_golden(golden: SimpleNamespace) -> None:
    one = torch.tensor([True])
    for ratio, advantage, expected in golden.POLICY_LOSSES:
        loss, _, stats = run(policy_loss, torch.tensor([ratio]).log(), torch.zeros(1),
                             torch.tensor([advantage]), one, clip_range=0.2, backend="triton")
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert stats.policy_loss.item() == pytest.approx(expected, abs=1e-6)
        assert stats.clip_fraction.item() == ((ratio, advantage) in ((1.5, 1.0), (0.5, -1.0)))


def test_ratios_near_one_keep_the_digits_of_k3() -> None:
    """exp(u) - 1 - u of u = 1e-4 is 5e-9, below the last digit of 1 in float32."""
    one = torch.ones(1)
    stats = run(policy_loss, -1e-4 * one, 0 * one, one, one > 0, backend="triton")[2]
    assert stats.approx_kl_k3.item() == pytest.approx(5e-9, rel=1e-2)


def test_compiles_to_one_graph() -> None:
    tensors = inputs(3, 20)
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    eager, traced = (run(f, *tensors, backend="triton") for f in (policy_loss, compiled))
    torch.testing.assert_close(traced[:2], eager[:2])


def test_float64_is_refused() -> None:
    logprobs, *others = inputs(3)
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        policy_loss(logprobs.double(), *others, backend="triton")
