"""ppo_loss' Triton kernels against the float64 reference; run by test_triton.py."""

from dataclasses import fields
from typing import Any

import pytest
import torch
from fastrl_kernels.triton import ppo_loss as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import PolicyStats, ValueStats, compute_gae, ppo_loss
from fastrl.ops.ppo_loss import ppo_loss_reference
from fastrl.ops.whiten import row_moments

FLOOR = 2e-6  # float32's exp, and sums in another order
BLOCK = kernels.BLOCK_N
LEAVES = ("logprobs", "values")


class Case:
    """Inputs of one call; ratios and values on both sides of their clips, NaN where masked."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        mask = torch.rand(*shape) > 0.3
        self.inputs = {"logprobs": torch.randn(*shape) - 2, "advantages": torch.randn(*shape),
                       "values": torch.randn(*shape), "returns": 1 + torch.randn(*shape)}
        self.inputs["old_logprobs"] = self.inputs["logprobs"] + 0.3 * torch.randn(*shape)
        self.inputs["old_values"] = self.inputs["values"] + 0.3 * torch.randn(*shape)
        self.inputs = {name: x.to(dtype).masked_fill(~mask, torch.nan)
                       for name, x in self.inputs.items()}
        self.inputs["loss_mask"] = mask

    def run(self, function: Any = ppo_loss, double: bool = False, **options: Any
            ) -> tuple[Tensor, PolicyStats, ValueStats, list[Tensor]]:
        """Loss, statistics, and the gradients of log-probs and values."""
        inputs = {name: x.double() if double and x.is_floating_point() else x
                  for name, x in self.inputs.items()}
        leaves = {name: inputs[name].detach().requires_grad_() for name in LEAVES}
        loss, policy, values = function(**{**inputs, **leaves}, **options)
        (3 * loss).backward()
        return loss, policy, values, [x.grad for x in leaves.values()]

    def assert_as_good_as_torch(self, floor: float = FLOOR, **options: Any) -> None:
        options = {"value_coef": 0.1, **options}
        wide_options = {name: x.double() if isinstance(x, Tensor) else x
                        for name, x in options.items()}
        truth = self.run(ppo_loss_reference, double=True, **wide_options)
        plain = self.run(ppo_loss_reference, **options)
        ours = self.run(backend="triton", **options)
        for wide, torch_result, result in zip(*([x[0], *x[3]] for x in (truth, plain, ours)),
                                              strict=True):
            assert result.dtype == torch_result.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * (wide.abs().max() + 1e-30)
        for result, wide in zip(ours[1:3], truth[1:3], strict=True):
            assert_same_stats(result, wide)


def assert_same_stats(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert type(got) is type(expected)
    for field in fields(expected):
        result, wide = getattr(got, field.name), getattr(expected, field.name)
        assert result.dtype == torch.float64 and not result.requires_grad
        torch.testing.assert_close(result, wide, rtol=rtol, atol=1e-5, equal_nan=True)


# One token, below, at and above a block, and more blocks than are added at a time.
@pytest.mark.parametrize("shape", [(1,), (3, 7), (BLOCK,), (2, BLOCK // 2 + 1), (3, 3, 500)])
@pytest.mark.parametrize("denominator", [None, 7.0])
def test_sizes(shape: tuple[int, ...], denominator: float | None) -> None:
    Case(*shape).assert_as_good_as_torch(denominator=denominator)


def test_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK_N", 16)
    Case(16 * kernels.BLOCK_PARTS + 40).assert_as_good_as_torch()


@pytest.mark.parametrize("options", [
    {"clip_range": 0.05}, {"value_clip_range": 0.01}, {"value_clip_range": None},
    {"value_coef": 0.0}, {"value_coef": 2.0}, {"denominator": 1e5}])
def test_coefficients(options: dict[str, float | None]) -> None:
    Case(2, 40).assert_as_good_as_torch(**options)


# The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, 2^-8.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_narrow_inputs(dtype: torch.dtype, floor: float) -> None:
    Case(3, 50, dtype=dtype).assert_as_good_as_torch(floor)


def test_log_probs_and_values_of_different_types() -> None:
    case = Case(3, 50)
    case.inputs["logprobs"] = case.inputs["logprobs"].half()
    case.assert_as_good_as_torch(2**-11)


@pytest.mark.parametrize("num_parts", [3, 1100])
def test_whitens_by_moments(num_parts: int) -> None:
    case = Case(2, 40)
    whole = torch.randn(num_parts, 5) * 4 + 2
    case.assert_as_good_as_torch(5e-6, moments=row_moments(whole, whole > -5))


def test_after_gae(launches: list[str]) -> None:
    """GAE, whitening and the loss in three launches, equal to the plain functions in sequence."""
    case = Case(4, 30)
    mask = case.inputs["loss_mask"]
    advantages, returns, moments = compute_gae(torch.randn(4, 30), case.inputs["old_values"], mask,
                                               return_moments=True, backend="triton")
    case.inputs |= {"advantages": advantages, "returns": returns}
    case.assert_as_good_as_torch(5e-6, moments=moments)
    assert launches == ["_gae_fwd_kernel", "_ppo_loss_fwd_kernel", "_ppo_loss_reduce_kernel"]


def test_not_contiguous() -> None:
    case = Case(8, 6)
    case.inputs = {name: x.t() for name, x in case.inputs.items()}
    case.assert_as_good_as_torch()
    case.inputs = {name: x[::2] for name, x in case.inputs.items()}
    case.assert_as_good_as_torch()


def test_ties_and_bounds_are_those_of_torch() -> None:
    """Log-ratios on and beyond their bounds, values on the edge of their clip and tied beyond it.

    Where a ratio is as large as its clip allows is left to the last digit of exp.
    """
    case = Case(8)
    case.inputs |= {
        "loss_mask": torch.ones(8, dtype=torch.bool),
        "old_logprobs": torch.zeros(8),
        "logprobs": torch.tensor([0.0, 20.0, -20.0, 21.0, -21.0, 0.25, -0.25, 1.5]),
        "advantages": torch.tensor([1.0, -1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 0.0]),
        "old_values": torch.tensor([0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 1.0, -1.0]),
        # On the upper and the lower edge; beyond it as far from the target as the edge is.
        "values": torch.tensor([0.25, -0.25, 0.5, -0.5, 0.75, 1.0, 1.0, 2.0]),
        "returns": torch.tensor([1.0, 1.0, 0.375, -0.375, 0.75, 0.0, 1.0, -3.0]),
    }
    for clip_range in (0.2, 0.5):
        options = {"clip_range": clip_range, "value_clip_range": 0.25}
        expected = case.run(ppo_loss_reference, **options)
        got = case.run(backend="triton", **options)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(got[3], expected[3])
        for a, b in zip(got[1:3], expected[1:3], strict=True):
            assert_same_stats(a, b)
    ties = got[3][1][2:4] * 8 / 3
    torch.testing.assert_close(ties, torch.tensor([0.0625, -0.0625]))  # half of the error


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "values", "old_values",
                                  "returns"])
def test_nan_that_counts_reaches_the_loss_as_in_torch(name: str) -> None:
    case = Case(3, 20)
    case.inputs["loss_mask"][1] = True
    for x in case.inputs.values():
        if x.is_floating_point():
            x.nan_to_num_()
    case.inputs[name][1, 4] = torch.nan
    got, expected = case.run(backend="triton"), case.run(ppo_loss_reference)
    assert got[0].isnan() and expected[0].isnan()
    torch.testing.assert_close(got[3], expected[3], equal_nan=True)
    for a, b in zip(got[1:3], expected[1:3], strict=True):
        assert_same_stats(a, b)


def test_infinite_where_masked_and_an_infinite_ratio() -> None:
    case = Case(3, 20)
    for name, x in case.inputs.items():
        if name != "loss_mask":
            x.nan_to_num_(nan=torch.inf)
    case.assert_as_good_as_torch()
    case.inputs["loss_mask"][0, 0] = True
    for name, x in case.inputs.items():
        x[0, 0] = -torch.inf if name == "old_logprobs" else 1.0
    got, expected = case.run(backend="triton"), case.run(ppo_loss_reference)
    assert got[1].max_abs_log_ratio == torch.inf and got[0].isfinite()
    torch.testing.assert_close(got[3], expected[3])


def test_nothing_counts_and_no_tokens() -> None:
    masked, empty = Case(3, 20), Case(0)
    masked.inputs["loss_mask"][:] = False
    for case in (masked, empty):
        for moments in (None, torch.zeros(1, 3)):
            loss, policy, values, gradients = case.run(backend="triton", moments=moments)
            assert loss.item() == 0
            assert all(getattr(stats, field.name).item() == 0 for stats in (policy, values)
                       for field in fields(stats))
            assert all((gradient == 0).all() for gradient in gradients)


def test_a_token_does_not_depend_on_the_others() -> None:
    case = Case(BLOCK + 9)
    together = case.run(backend="triton", denominator=1.0)[3]
    for piece in (slice(0, 5), slice(BLOCK - 2, BLOCK + 9)):
        part = Case(1)
        part.inputs = {name: x[piece] for name, x in case.inputs.items()}
        alone = part.run(backend="triton", denominator=1.0)[3]
        assert all(torch.equal(a, t[piece]) for a, t in zip(alone, together, strict=True))


def test_microbatches_add_up_and_the_same_bits_every_time() -> None:
    case = Case(4, 300)
    whole, again = (case.run(backend="triton", denominator=100.0) for _ in range(2))
    assert torch.equal(whole[0], again[0])
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = Case(1)
        part.inputs = {name: x[rows] for name, x in case.inputs.items()}
        parts.append(part.run(backend="triton", denominator=100.0))
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    for i in (1, 2):
        assert_same_stats(parts[0][i] + parts[1][i], whole[i])


@pytest.mark.parametrize("leaf", LEAVES)
def test_only_the_gradients_asked_for(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    launch = kernels.ppo_loss_fwd
    monkeypatch.setattr(kernels, "ppo_loss_fwd", lambda *a: made.append(launch(*a)) or made[-1])
    case = Case(3, 20)
    case.inputs[leaf].requires_grad_()
    loss, *_ = ppo_loss(**case.inputs, backend="triton")
    loss.backward()
    with torch.no_grad():
        silent, *_ = ppo_loss(**case.inputs, backend="triton")
    assert torch.equal(silent, loss) and not silent.requires_grad
    sizes = [[gradient.numel() for gradient in outputs[3:]] for outputs in made]
    assert sizes == [[60 * (leaf == name) for name in LEAVES], [0, 0]]
    assert all((x.grad is not None) == (name == leaf) for name, x in case.inputs.items())


def test_registered_op() -> None:
    case, moments = Case(3, 20), torch.rand(2, 3) + 1
    order = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns")
    policy, values = ([case.inputs[name] for name in names] for names in (order[:3], order[3:]))
    nothing, mask = [None] * 3, case.inputs["loss_mask"]
    for inputs, given, denominator, clip, needs in (
        ([*policy, *values], moments, None, 0.2, [True, True]),
        ([*policy, *nothing], None, 7.0, None, [False, False]),
        ([*nothing, *values], None, None, None, [False, True]),
    ):
        settings = (denominator, 0.2, clip, 0.1, 20.0, 1e-8)
        torch.library.opcheck(torch.ops.fastrl_kernels.ppo_loss,
                              (*inputs, mask, given, *settings, needs))


def test_compiles_to_one_graph() -> None:
    case, moments = Case(3, 20), torch.tensor([[20.0, 3.0, 50.0]])
    compiled = torch.compile(ppo_loss, fullgraph=True, backend="aot_eager")
    eager = case.run(backend="triton", moments=moments)
    traced = case.run(compiled, backend="triton", moments=moments)
    assert torch.equal(traced[0], eager[0])
    torch.testing.assert_close(traced[3], eager[3], rtol=1e-6, atol=0)
    assert torch.equal(traced[1].squared_ratio, eager[1].squared_ratio)
    assert torch.equal(traced[2].explained_variance, eager[2].explained_variance)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        Case(2, 3).run(double=True, backend="triton")
