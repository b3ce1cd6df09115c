"""linear_cross_entropy: by hand, and equal to plain autograd for any chunking, mask and weights."""

import math

import pytest
import torch
from torch import Tensor

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import linear_cross_entropy, linear_logprobs
from fastrl.ops.linear_cross_entropy import linear_cross_entropy_reference

M, D, V = 13, 5, 11


def inputs(dtype: torch.dtype = torch.float64, M: int = M, D: int = D, V: int = V
           ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias that want gradients, and tokens."""
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype).requires_grad_()
                            for shape in ((M, D), (V, D), (V,)))
    return hidden, weight, bias, torch.randint(V, (M,))


def gradients(function, hidden: Tensor, weight: Tensor, bias: Tensor, token_ids: Tensor,
              *mask: Tensor, **keywords) -> list[Tensor]:
    """The loss, then the gradients of three times it."""
    loss = function(hidden, weight, token_ids, *mask, bias=bias, **{"denominator": 7.0, **keywords})
    return [loss, *torch.autograd.grad(3 * loss, (hidden, weight, bias))]


def test_a_masked_token_id_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")
    hidden, weight, bias, token_ids = inputs()
    mask = torch.arange(M) % 3 > 0
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        expected = gradients(function, hidden, weight, bias, token_ids, mask)
        for other in (-100, V, 2**40):
            got = gradients(function, hidden, weight, bias, token_ids.where(mask, other), mask)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_by_hand() -> None:
    """Odds 1 : 2 : 1 and 2 : 1 : 1, weights 1 and 3, over 2; the last token does not count."""
    log2 = math.log(2)
    hidden = torch.tensor([[0.0, 1.0], [1.0, 0.0], [5.0, 5.0]], requires_grad=True)
    weight = torch.tensor([[log2, 0.0], [0.0, log2], [0.0, 0.0]], requires_grad=True)
    loss = linear_cross_entropy(
        hidden, weight, torch.tensor([1, 2, 0]), torch.tensor([True, True, False]), denominator=2,
        token_weights=torch.tensor([1.0, 3.0, 9.0]))
    # -log 1/2 and -log 1/4.
    assert loss.item() == pytest.approx((1 * log2 + 3 * 2 * log2) / 2)
    loss.backward()
    # w (p - onehot) / 2: (1/8, -1/4, 1/8) and (3/4, 3/8, -9/8).
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75, 0.125], [0.375, -0.25],
                                                          [-1.125, 0.125]]))
    torch.testing.assert_close(hidden.grad, log2 * torch.tensor([[0.125, -0.25], [0.75, 0.375],
                                                                 [0.0, 0.0]]))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("has_mask, has_weights", [(False, False), (True, False), (True, True)])
def test_equals_the_reference(chunk_tokens: int | None, has_mask: bool, has_weights: bool) -> None:
    tensors = [*inputs(), *([torch.arange(M) % 3 != 1] if has_mask else [])]
    options = {"temperature": 0.7,
               "token_weights": torch.linspace(-1, 2, M) if has_weights else None}
    expected = gradients(linear_cross_entropy_reference, *tensors, **options)
    got = gradients(linear_cross_entropy, *tensors, chunk_tokens=chunk_tokens, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# One row; one token to choose from; GPT-2's vocabulary, which no chunk size divides.
@pytest.mark.parametrize("M, D, V", [(1, 5, 11), (3, 1, 1), (3, 4, 50257)])
def test_equals_the_sum_of_log_probs(M: int, D: int, V: int) -> None:
    hidden, weight, bias, token_ids = tensors = inputs(torch.float32, M, D, V)
    logprobs, _ = linear_logprobs(hidden, weight, token_ids, bias=bias)
    loss = -logprobs.sum() / 7
    expected = [loss, *torch.autograd.grad(3 * loss, tensors[:3])]
    for a, b in zip(gradients(linear_cross_entropy, *tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_microbatches_add_up() -> None:
    hidden, weight, bias, token_ids = tensors = inputs()
    whole = gradients(linear_cross_entropy, *tensors)
    parts = [gradients(linear_cross_entropy, hidden.detach()[rows].requires_grad_(), weight, bias,
                       token_ids[rows]) for rows in (slice(0, 5), slice(5, None))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1])
    torch.testing.assert_close(parts[0][2] + parts[1][2], whole[2])


def test_gradcheck() -> None:
    hidden, weight, bias, token_ids = inputs(M=4, D=3, V=5)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, token_ids, bias=b, temperature=0.7,
                                             denominator=3, token_weights=weights, chunk_tokens=3),
        (hidden, weight, bias))


def test_masked_rows_may_hold_anything() -> None:
    hidden, weight, bias, token_ids = inputs()
    mask, weights = torch.arange(M) % 3 != 1, torch.ones(M)
    expected = gradients(linear_cross_entropy, hidden, weight, bias, token_ids, mask)
    weights[~mask] = torch.nan
    spoiled = hidden.detach().masked_fill(~mask[:, None], torch.nan).requires_grad_()
    got = gradients(linear_cross_entropy, spoiled, weight, bias, token_ids, mask,
                    token_weights=weights)
    torch.testing.assert_close(got, expected)
    assert (got[1][~mask] == 0).all()


def test_forbidden_tokens() -> None:
    hidden, weight, bias, token_ids = inputs()
    with torch.no_grad():
        bias[-1] = -math.inf
    token_ids.clamp_(max=V - 2)
    expected = gradients(linear_cross_entropy_reference, hidden, weight, bias, token_ids)
    for a, b in zip(gradients(linear_cross_entropy, hidden, weight, bias, token_ids), expected,
                    strict=True):
        torch.testing.assert_close(a, b)
    token_ids[0] = V - 1
    weights = torch.ones(M)
    assert linear_cross_entropy(hidden, weight, token_ids, bias=bias, denominator=1) == math.inf
    weights[0] = 0.0
    assert linear_cross_entropy(hidden, weight, token_ids, bias=bias, denominator=1,
                                token_weights=weights).isfinite()


def test_nothing_counts_and_no_tokens() -> None:
    nothing = gradients(linear_cross_entropy, *inputs(), torch.zeros(M, dtype=torch.bool))
    empty = gradients(linear_cross_entropy, *inputs(M=0))
    for loss, *rest in (nothing, empty):
        assert loss == 0 and all((gradient == 0).all() for gradient in rest)


def test_only_the_gradients_asked_for() -> None:
    hidden, weight, _, token_ids = inputs()
    frozen = weight.detach()
    linear_cross_entropy(hidden, frozen, token_ids, denominator=1).backward()
    assert hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, token_ids, denominator=1).requires_grad


def test_no_logits_are_kept_for_the_backward_pass() -> None:
    hidden, weight, bias, token_ids = inputs(M=64, D=4, V=1000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_cross_entropy(hidden, weight, token_ids, bias=bias, denominator=1)
    assert sorted(kept) == [64 * 4, 1000, 1000 * 4]


def test_bad_input() -> None:
    hidden, weight, token_ids = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"expected one shape \[M\] for token_ids, loss_mask"):
        linear_cross_entropy(hidden, weight, token_ids, torch.tensor([True]), denominator=1)
    with pytest.raises(ShapeError, match="loss_mask to be bool"):
        linear_cross_entropy(hidden, weight, token_ids, torch.ones(2), denominator=1)
    with pytest.raises(ShapeError, match=r"token_weights \[3\]"):
        linear_cross_entropy(hidden, weight, token_ids, denominator=1, token_weights=torch.ones(3))
    with pytest.raises(ShapeError, match="token_weights to be floating point"):
        linear_cross_entropy(hidden, weight, token_ids, denominator=1, token_weights=token_ids)
    with pytest.raises(ConfigError, match="denominator above 0"):
        linear_cross_entropy(hidden, weight, token_ids, denominator=0)
