"""shape_rewards' Triton kernel against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton.rewards import MAX_BLOCK
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import shape_rewards
from fastrl.ops.rewards import shape_rewards_reference

ESTIMATORS = ("k1", "k2", "k3")
FLOOR = 3e-6  # float32's exp, against expm1 in the reference


def batch(B: int, T: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, log-probs and a mask with holes and a row that is all masked; NaN where masked."""
    mask = torch.rand(B, T) > 0.3
    mask[B // 2] = B == 1
    logprobs, ref = (-3 * torch.rand(2, B, T)).masked_fill(~mask, torch.nan)
    return torch.randn(B), logprobs, ref, mask


def run(function, *inputs: Tensor, **settings) -> list[Tensor]:
    """Rewards and the estimate, or with return_estimates all three."""
    rewards, kl = function(*inputs, kl_coef=0.3, **settings)
    return [rewards, *(kl if isinstance(kl, tuple) else (kl,))]


def assert_as_good_as_torch(*inputs: Tensor, **settings) -> None:
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    truths = run(shape_rewards_reference, *wide, **settings)
    plain = run(shape_rewards_reference, *inputs, **settings)
    ours = run(shape_rewards, *inputs, backend="triton", **settings)
    for truth, torch_result, result in zip(truths, plain, ours, strict=True):
        assert result.shape == truth.shape and result.dtype == torch.float32
        error = (result - truth).abs().max()
        assert error <= 2 * (torch_result - truth).abs().max() + FLOOR * (1 + truth.abs().max())


# One token, below a block, and two blocks that do not fill.
@pytest.mark.parametrize("B, T", [(1, 1), (3, 31), (3, MAX_BLOCK + 77)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_holes(B: int, T: int, estimator: str) -> None:
    assert_as_good_as_torch(*batch(B, T), estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_not_contiguous_and_far_apart(estimator: str) -> None:
    scores, logprobs, ref, mask = batch(5, 6)
    assert_as_good_as_torch(scores.repeat_interleave(2)[:12:2][:5], logprobs.t().contiguous().t(),
                            ref.repeat_interleave(2, 1)[:, ::2], mask.t().contiguous().t(),
                            estimator=estimator)
    far = torch.tensor([[-200.0, -1.0, -1.0 - 1e-4]]), torch.tensor([[-1.0, -200.0, -1.0]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    assert_as_good_as_torch(torch.ones(1), *far, everything, estimator=estimator)


def test_the_last_token_may_lie_in_an_earlier_block() -> None:
    scores, logprobs, ref, mask = batch(1, MAX_BLOCK + 77)
    mask[:, 40:] = False
    assert_as_good_as_torch(scores, logprobs, ref, mask, estimator="k1")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_all_estimates_in_the_same_launch(launches: list[str], estimator: str) -> None:
    inputs = batch(3, MAX_BLOCK + 77)
    assert_as_good_as_torch(*inputs, estimator=estimator, return_estimates=True)
    assert launches == ["_shape_rewards_fwd_kernel"]
    every = run(shape_rewards, *inputs, backend="triton", estimator=estimator,
                return_estimates=True)
    one = run(shape_rewards, *inputs, backend="triton", estimator=estimator)
    assert torch.equal(every[0], one[0])
    assert torch.equal(every[1 + ESTIMATORS.index(estimator)], one[1])


def test_nan_in_a_token_that_counts_is_not_hidden() -> None:
    inputs = torch.ones(1), torch.tensor([[torch.nan]]), torch.ones(1, 1), torch.tensor([[True]])
    assert all(x.isnan().all() for x in run(shape_rewards, *inputs, backend="triton",
                                            return_estimates=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs(dtype: torch.dtype) -> None:
    scores, logprobs, ref, mask = batch(3, 20)
    assert_as_good_as_torch(scores.to(dtype).float(), logprobs.to(dtype), ref.to(dtype), mask,
                            estimator="k3")


def test_registered_op() -> None:
    for num_estimates in (1, 3):
        torch.library.opcheck(torch.ops.fastrl_kernels.shape_rewards,
                              (*batch(3, 9), 0.1, "k3", num_estimates))


def test_compiles_to_one_graph() -> None:
    inputs, options = batch(3, 9), {"kl_coef": 0.1, "estimator": "k3", "backend": "triton"}
    compiled = torch.compile(shape_rewards, fullgraph=True, backend="aot_eager")
    for traced, eager in zip(compiled(*inputs, **options), shape_rewards(*inputs, **options),
                             strict=True):
        assert torch.equal(traced, eager)


def test_float64_is_refused() -> None:
    scores, logprobs, ref, mask = batch(2, 3)
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        shape_rewards(scores, logprobs.double(), ref, mask, kl_coef=0.1, backend="triton")
