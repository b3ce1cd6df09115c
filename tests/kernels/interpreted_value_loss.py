"""value_loss' Triton entry against the float64 reference; run by test_triton.py.

The kernels are ppo_loss', whose tests say more.
"""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import ValueStats, value_loss
from fastrl.ops.value_loss import value_loss_reference

FLOOR = 1e-6  # float32 sums in another order


def inputs(*shape: int) -> list[Tensor]:
    """Values, old values, returns, NaN where masked, and the mask."""
    mask = torch.rand(*shape) > 0.3
    old_values, returns = torch.randn(2, *shape)
    values = old_values + 0.3 * torch.randn(*shape)
    return [*(x.masked_fill(~mask, torch.nan) for x in (values, old_values, returns)), mask]


def run(function: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, Tensor, ValueStats]:
    leaf = tensors[0].detach().requires_grad_()
    loss, stats = function(leaf, *tensors[1:], **options)
    (3 * loss).backward()
    return loss, leaf.grad, stats


@pytest.mark.parametrize("shape", [(1,), (3, 700)])
@pytest.mark.parametrize("options", [{}, {"denominator": 9.0, "value_clip_range": 0.1},
                                     {"value_clip_range": None}])
def test_as_good_as_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    tensors = inputs(*shape)
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    truth = run(value_loss_reference, *wide, **options)
    plain = run(value_loss_reference, *tensors, **options)
    ours = run(value_loss, *tensors, **options, backend="triton")
    for i in range(2):
        error, torch_error = ((x[i] - truth[i]).abs().max() for x in (ours, plain))
        assert error <= 2 * torch_error + FLOOR * (truth[i].abs().max() + 1e-30)
    for field in fields(ValueStats):
        torch.testing.assert_close(getattr(ours[2], field.name), getattr(truth[2], field.name),
                                   rtol=1e-5, atol=1e-5)


def test_golden(golden: SimpleNamespace) -> None:
    one = torch.tensor([True])
    for value, old_value, target, expected in golden.VALUE_LOSSES:
        loss, _, stats = run(value_loss, *(torch.tensor([x]) for x in (value, old_value, target)),
                             one, value_clip_range=0.2, backend="triton")
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert stats.value_loss.item() == pytest.approx(expected, abs=1e-6)
        assert stats.clip_fraction.item() == (expected == 0.845)


def test_compiles_to_one_graph() -> None:
    tensors = inputs(3, 20)
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager")
    eager, traced = (run(f, *tensors, backend="triton") for f in (value_loss, compiled))
    torch.testing.assert_close(traced[:2], eager[:2])


def test_float64_is_refused() -> None:
    values, *others = inputs(3)
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        value_loss(values.double(), *others, backend="triton")
