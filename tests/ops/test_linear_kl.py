"""linear_kl: by hand on three tokens, and equal to plain autograd for any chunking."""

import math

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import kl_estimate, linear_kl
from fastrl.ops.linear_kl import linear_kl_reference

M, D, D2, V = 13, 5, 4, 11


def inputs(dtype: torch.dtype = torch.float64, M: int = M, V: int = V) -> list[Tensor]:
    """hidden, weight, bias of the policy, which want gradients, then those of the reference."""
    shapes = ((M, D), (V, D), (V,), (M, D2), (V, D2), (V,))
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return [x.requires_grad_() if i < 3 else x for i, x in enumerate(tensors)]


def gradients(function, hidden: Tensor, weight: Tensor, bias: Tensor, ref_hidden: Tensor,
              ref_weight: Tensor, ref_bias: Tensor, **keywords) -> list[Tensor]:
    """KL, then the gradients of a sum with different weight on every row."""
    kl = function(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, **keywords)
    total = (torch.linspace(-1, 2, len(kl), dtype=kl.dtype) * kl).sum()
    return [kl, *torch.autograd.grad(total, (hidden, weight, bias))]


@pytest.mark.parametrize("direction, expected, dlogits", [
    # q = (1/2, 1/4, 1/4), p = (1/4, 1/2, 1/4): 1/2 log 2 - 1/4 log 2; q (log q - log p - KL).
    ("reverse", 0.25 * math.log(2), (0.375 * math.log(2), -0.3125 * math.log(2),
                                     -0.0625 * math.log(2))),
    # -1/4 log 2 + 1/2 log 2; q - p.
    ("forward", 0.25 * math.log(2), (0.25, -0.25, 0.0)),
])
def test_by_hand(direction: str, expected: float, dlogits: tuple[float, ...]) -> None:
    one, log2 = torch.ones(1, 1), math.log(2)
    weight = torch.tensor([[log2], [0.0], [0.0]], requires_grad=True)
    kl = linear_kl(one, weight, one, torch.tensor([[0.0], [log2], [0.0]]), direction=direction)
    assert kl.item() == pytest.approx(expected)
    kl.sum().backward()
    torch.testing.assert_close(weight.grad[:, 0], torch.tensor(dlogits))


def test_the_two_directions_differ() -> None:
    """q = (1/2, 1/2), p = (1/4, 3/4)."""
    one, p = torch.ones(1, 1), torch.tensor([[0.25], [0.75]]).log()
    reverse, forward = (linear_kl(one, torch.zeros(2, 1), one, p, direction=d).item()
                        for d in ("reverse", "forward"))
    assert reverse == pytest.approx(math.log(2) - 0.5 * math.log(3))
    assert forward == pytest.approx(0.75 * math.log(3) - math.log(2))


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_reference(direction: str, chunk_tokens: int | None, temperature: float) -> None:
    tensors = inputs()
    options = {"direction": direction, "temperature": temperature}
    expected = gradients(linear_kl_reference, *tensors, **options)
    got = gradients(linear_kl, *tensors, chunk_tokens=chunk_tokens, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradcheck(direction: str) -> None:
    *policy, ref_hidden, ref_weight, ref_bias = inputs(M=3, V=5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_kl(h, w, ref_hidden, ref_weight, bias=b, ref_bias=ref_bias,
                                  temperature=0.7, direction=direction, chunk_tokens=2), policy)


def test_is_the_expectation_of_kl_estimate() -> None:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (x.detach() for x in inputs())
    policy = torch.log_softmax(hidden @ weight.T + bias, dim=1)
    reference = torch.log_softmax(ref_hidden @ ref_weight.T + ref_bias, dim=1)
    k1, _, k3 = kl_estimate(policy, reference)
    kl = linear_kl(hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias)
    torch.testing.assert_close((policy.exp() * k1).sum(dim=1), kl)
    torch.testing.assert_close((policy.exp() * k3).sum(dim=1), kl)


def test_equal_models_have_no_distance_and_no_gradient() -> None:
    hidden, weight, bias, *_ = inputs(torch.float32, V=1000)
    same = [x.detach() for x in (hidden, weight, bias)]
    for direction in ("reverse", "forward"):
        kl, *rest = gradients(linear_kl, hidden, weight, bias, *same, direction=direction)
        assert kl.abs().max() == 0 and all(gradient.abs().max() == 0 for gradient in rest)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_tokens_forbidden_by_both_are_as_if_they_were_not_there(direction: str) -> None:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = inputs()
    expected = gradients(linear_kl, hidden, *(x.detach()[:-2].requires_grad_()
                                              for x in (weight, bias)),
                         ref_hidden, ref_weight[:-2], ref_bias[:-2], direction=direction)
    with torch.no_grad():
        bias[-2:] = ref_bias[-2:] = -math.inf
    got = gradients(linear_kl, hidden, weight, bias, ref_hidden, ref_weight, ref_bias,
                    direction=direction)
    torch.testing.assert_close(got[:2], expected[:2])
    for a, b in zip(got[2:], expected[2:], strict=True):
        torch.testing.assert_close(a[:-2], b)
        assert (a[-2:] == 0).all()


def test_a_token_that_the_second_alone_forbids_is_infinitely_far() -> None:
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias = (x.detach() for x in inputs())
    ref_bias[3] = -math.inf
    options = {"bias": bias, "ref_bias": ref_bias}
    inputs_ = hidden, weight, ref_hidden, ref_weight
    assert (linear_kl(*inputs_, **options) == math.inf).all()
    assert linear_kl(*inputs_, **options, direction="forward").isfinite().all()


def test_no_logits_are_kept_and_only_the_gradients_asked_for() -> None:
    hidden, weight, bias, *reference = inputs(M=64, V=1000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_kl(hidden, weight, *reference[:2], bias=bias)
    assert max(kept) == 1000 * D
    frozen = weight.detach()
    ref_weight = reference[1].requires_grad_()
    linear_kl(hidden, frozen, reference[0], ref_weight).sum().backward()
    assert hidden.grad is not None and frozen.grad is None and ref_weight.grad is None
    with torch.no_grad():
        assert not linear_kl(hidden, weight, *reference[:2]).requires_grad


def test_no_tokens() -> None:
    kl, *rest = gradients(linear_kl, *inputs(M=0))
    assert kl.shape == (0,) and all((gradient == 0).all() for gradient in rest)


def test_bfloat16_is_widened_before_the_product() -> None:
    half = [x.detach().bfloat16() for x in inputs(torch.float32)]
    tensors = [x.requires_grad_() if i < 3 else x for i, x in enumerate(half)]
    exact = [x.detach().double().requires_grad_() for x in half]
    got, expected = gradients(linear_kl, *tensors), gradients(linear_kl_reference, *exact)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() <= 3e-3 * b.norm()


def test_bad_input() -> None:
    hidden, weight = torch.ones(2, 3), torch.ones(5, 3)
    with pytest.raises(ShapeError, match=r"ref_hidden \[M, D\] and ref_weight \[V, D\], got"):
        linear_kl(hidden, weight, hidden, torch.ones(5, 4))
    with pytest.raises(ShapeError, match=r"one M and one V .* got \[2, 5\] and \[2, 6\]"):
        linear_kl(hidden, weight, hidden, torch.ones(6, 3))
    with pytest.raises(ShapeError, match=r"ref_bias \[V\] with V = 5, got \[4\]"):
        linear_kl(hidden, weight, hidden, weight, ref_bias=torch.ones(4))
    with pytest.raises(ConfigError, match="expected direction reverse or forward, got 'both'"):
        linear_kl(hidden, weight, hidden, weight, direction="both")
    with pytest.raises(ConfigError, match="temperature above 0"):
        linear_kl(hidden, weight, hidden, weight, temperature=0.0)
