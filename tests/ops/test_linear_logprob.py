"""linear_logprobs: equals the op on stored logits, in values and gradients, for any chunking."""

import math

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import linear_logprob as module
from fastrl.ops import linear_logprobs
from fastrl.ops.linear_logprob import chunk_slices, linear_logprobs_reference

M, D, V = 13, 5, 11


def inputs(dtype: torch.dtype = torch.float64, M: int = M, D: int = D, V: int = V
           ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias that want gradients, and tokens."""
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_()
                            for shape in ((M, D), (V, D), (V,)))
    return hidden, weight, bias, torch.randint(V, (M,))


def gradients(function, hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor,
              **keywords) -> list[Tensor]:
    """Results, then the gradients of a mixture of them with different weight on every row."""
    logprobs, entropy = function(hidden, weight, token_ids, bias=bias, **keywords)
    weights = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    total = (weights * logprobs).sum() + (weights.flip(0) * entropy).sum()
    return [logprobs, entropy, *torch.autograd.grad(total, (hidden, weight, bias))]


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_the_reference(chunk_tokens: int | None, temperature: float) -> None:
    tensors = inputs()
    expected = gradients(linear_logprobs_reference, *tensors, temperature=temperature)
    got = gradients(linear_logprobs, *tensors, temperature=temperature, chunk_tokens=chunk_tokens)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# One row; one token to choose from; GPT-2's vocabulary, which no chunk size divides.
@pytest.mark.parametrize("M, D, V", [(1, 5, 11), (3, 1, 1), (3, 4, 50257)])
def test_odd_shapes(M: int, D: int, V: int) -> None:
    tensors = inputs(torch.float32, M, D, V)
    expected = gradients(linear_logprobs_reference, *(
        x.detach().double().requires_grad_() if x.is_floating_point() else x for x in tensors))
    for a, b in zip(gradients(linear_logprobs, *tensors), expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm() + 1e-6


def test_gradcheck() -> None:
    hidden, weight, bias, token_ids = inputs(M=4, D=3, V=5)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, token_ids, bias=b, temperature=0.7, chunk_tokens=3),
        (hidden, weight, bias))


def test_one_output_alone() -> None:
    """The gradient of log-probs only, and of entropy only, is that of the mixture's part."""
    hidden, weight, bias, token_ids = inputs()
    for index in (0, 1):
        got, expected = (
            torch.autograd.grad(f(hidden, weight, token_ids, bias=bias)[index].sum(),
                                (hidden, weight, bias))
            for f in (linear_logprobs, linear_logprobs_reference))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_only_the_gradients_asked_for() -> None:
    hidden, weight, _, token_ids = inputs()
    frozen = weight.detach()
    logprobs, _ = linear_logprobs(hidden, frozen, token_ids)
    logprobs.sum().backward()
    assert hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight, token_ids)[0].requires_grad


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    hidden, weight, bias, token_ids = inputs(M=64, D=4, V=1000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_logprobs(hidden, weight, token_ids, bias=bias)
    assert sorted(kept) == [64, 64 * 4, 1000, 1000 * 4]


def test_chunks_are_nearly_equal_and_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 10 * 100)  # ten rows of 100 float32
    sizes = [s.stop - s.start for s in chunk_slices(31, 100, 4, None)]
    assert sizes == [7, 8, 8, 8]
    assert [s.stop - s.start for s in chunk_slices(5, 10**9, 4, None)] == [1] * 5
    assert chunk_slices(0, 100, 4, None) == [slice(0, 0)]


def test_no_tokens() -> None:
    hidden, weight, bias, token_ids = inputs(M=0)
    logprobs, entropy, *rest = gradients(linear_logprobs, hidden, weight, bias, token_ids)
    assert logprobs.shape == entropy.shape == (0,)
    assert all((gradient == 0).all() for gradient in rest)


def test_forbidden_tokens() -> None:
    """A bias of -inf is as if the token were not in the vocabulary."""
    hidden, weight, bias, _ = inputs(torch.float32)
    token_ids = torch.arange(M) % (V - 2)
    forbidden = bias.detach().clone()
    forbidden[-2:] = -math.inf
    got = gradients(linear_logprobs, hidden, weight, forbidden.requires_grad_(), token_ids)
    small_weight, small_bias = (x.detach()[:-2].requires_grad_() for x in (weight, bias))
    expected = gradients(linear_logprobs_reference, hidden, small_weight, small_bias, token_ids)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(got[3:], expected[3:], strict=True):
        torch.testing.assert_close(a[:-2], b)
        assert (a[-2:] == 0).all()
    never = linear_logprobs(hidden, weight, torch.full((M,), V - 1), bias=forbidden)
    assert (never[0] == -math.inf).all() and never[1].isfinite().all()


def test_extreme_logits() -> None:
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    logprobs, entropy = linear_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    (logprobs + entropy).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_bfloat16_is_widened_before_the_product() -> None:
    """Rounding logits to bfloat16 would cost 1e-2 here."""
    hidden, weight, bias, token_ids = inputs(torch.float32, M=8, D=64, V=500)
    half = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    exact = [x.detach().double().requires_grad_() for x in half]
    got = gradients(linear_logprobs, *half, token_ids)
    expected = gradients(linear_logprobs_reference, *exact, token_ids)
    for a, b in zip(got[:2], expected[:2], strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    for a, b in zip(got[2:], expected[2:], strict=True):
        assert a.dtype == torch.bfloat16  # as the parameters are; rounded once, at the end
        assert (a.double() - b).norm() <= 3e-3 * b.norm()


def test_bad_input() -> None:
    hidden, weight, token_ids = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"hidden \[M, D\] and weight \[V, D\], got \[2, 3\]"):
        linear_logprobs(hidden, torch.ones(5, 4), token_ids)
    with pytest.raises(ShapeError, match="V at least 1, got"):
        linear_logprobs(hidden, torch.ones(0, 3), token_ids)
    with pytest.raises(ShapeError, match=r"token_ids \[M\] with M = 2, got \[1\]"):
        linear_logprobs(hidden, weight, token_ids[:1])
    with pytest.raises(ShapeError, match=r"bias \[V\] with V = 5, got \[3\]"):
        linear_logprobs(hidden, weight, token_ids, bias=torch.ones(3))
    with pytest.raises(ShapeError, match="token_ids to be int64"):
        linear_logprobs(hidden, weight, token_ids.int())
    with pytest.raises(ConfigError, match="temperature above 0"):
        linear_logprobs(hidden, weight, token_ids, temperature=-1.0)
    with pytest.raises(ConfigError, match="chunk_tokens above 0"):
        linear_logprobs(hidden, weight, token_ids, chunk_tokens=0)
    with pytest.raises(ConfigError, match="expected logits chunked or none, got 'some'"):
        linear_logprobs(hidden, weight, token_ids, logits="some")
