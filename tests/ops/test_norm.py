"""rms_norm, layer_norm and both with an addition: values, casts, gradients, refusals."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fastrl.errors import NumericsError, ShapeError
from fastrl.ops import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def with_gradients(function: Any, *tensors: Tensor) -> list[Tensor]:
    """Outputs, and the inputs' gradients of a weighted sum of them."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum(((i + 1) * y.float().sin()).sum() for i, y in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def test_golden() -> None:
    # Mean square 25 / 2, and with epsilon 3.5 it is 16; variance 4, and with epsilon 12 it is 16.
    x, weight, bias = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 10.0]), torch.tensor([0.5, 2])
    assert rms_norm(x, weight, epsilon=3.5).tolist() == [[0.75, 10.0]]
    y, new_residual = add_rms_norm(x - 1, torch.ones(1, 2), weight, epsilon=3.5)
    assert (y.tolist(), new_residual.tolist()) == ([[0.75, 10.0]], [[3.0, 4.0]])
    x = torch.tensor([[1.0, 5.0]])
    assert layer_norm(x, weight, bias, epsilon=12.0).tolist() == [[0.0, 7.0]]
    y, new_residual = add_layer_norm(x - 1, torch.ones(1, 2), weight, bias, epsilon=12.0)
    assert (y.tolist(), new_residual.tolist()) == ([[0.0, 7.0]], [[1.0, 5.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_llama_bit_for_bit(dtype: torch.dtype) -> None:
    module = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    x, weight = torch.randn(7, 3, 48).to(dtype), torch.randn(48).to(dtype)

    def llama(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": weight}, x)

    expected = with_gradients(llama, x, weight)
    got = with_gradients(lambda x, w: rms_norm(x, w, epsilon=1e-5), x, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torch_layer_norm_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((7, 3, 48), (48,), (48,)))
    expected = with_gradients(
        lambda x, w, b: torch.nn.functional.layer_norm(x, (48,), w, b, 1e-5), x, weight, bias)
    got = with_gradients(lambda x, w, b: layer_norm(x, w, b, epsilon=1e-5), x, weight, bias)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adding_first_equals_adding_apart_bit_for_bit(dtype: torch.dtype) -> None:
    x, residual, weight, bias = (
        torch.randn(*s).to(dtype) for s in ((7, 48), (7, 48), (48,), (48,)))

    def apart(x: Tensor, residual: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        norm: Any = rms_norm if len(parameters) == 1 else layer_norm
        return norm(total, *parameters, epsilon=1e-5), total

    for op, parameters in ((add_rms_norm, (weight,)), (add_layer_norm, (weight, bias))):
        expected = with_gradients(apart, x, residual, *parameters)
        got = with_gradients(lambda *t, op=op: op(*t, epsilon=1e-5), x, residual, *parameters)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_are_independent() -> None:
    x, weight, bias = torch.randn(6, 33), torch.randn(33), torch.randn(33)
    for function in (lambda x: rms_norm(x, weight, epsilon=1e-5),
                     lambda x: layer_norm(x, weight, bias, epsilon=1e-5)):
        together = function(x)
        for n in range(6):
            assert torch.equal(function(x[n:n + 1])[0], together[n])


def test_a_row_of_zeros() -> None:
    x, ones = torch.zeros(1, 4, requires_grad=True), torch.ones(4)
    y = rms_norm(x, ones, epsilon=1e-6) + layer_norm(x, ones, ones, epsilon=1e-6)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(y, torch.ones(1, 4)) and gradient.isfinite().all()


def test_gradients() -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, residual, weight, bias = leaf(3, 2, 5), leaf(3, 2, 5), leaf(5), leaf(5)
    check = torch.autograd.gradcheck
    assert check(lambda *t: rms_norm(*t, epsilon=0.1), (x, weight))
    assert check(lambda *t: add_rms_norm(*t, epsilon=0.1), (x, residual, weight))
    assert check(lambda *t: layer_norm(*t, epsilon=0.1), (x, weight, bias))
    assert check(lambda *t: add_layer_norm(*t, epsilon=0.1), (x, residual, weight, bias))


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ones = torch.ones(2, 3), torch.ones(3)
    with pytest.raises(ShapeError, match=r"x \[..., D\] and weight \[D\], got \[2, 3\] and \[2\]"):
        rms_norm(x, ones[:2], epsilon=0.0)
    with pytest.raises(ShapeError, match=r"got \[\] and \[\]"):
        rms_norm(x[0, 0], ones[0], epsilon=0.0)
    with pytest.raises(ShapeError, match=r"expected weight \[3\] in torch.float32.*torch.float64"):
        rms_norm(x, ones.double(), epsilon=0.0)
    with pytest.raises(ShapeError, match=r"expected bias \[3\] in .* got \[1\]"):
        layer_norm(x, ones, ones[:1], epsilon=0.0)
    with pytest.raises(ShapeError, match=r"expected residual \[2, 3\] in .* got \[3\]"):
        add_rms_norm(x, ones, ones, epsilon=0.0)
    with pytest.raises(ShapeError, match="expected x to be floating point"):
        rms_norm(x.long(), ones.long(), epsilon=0.0)
    with pytest.raises(ShapeError, match="expected all tensors on one device"):
        layer_norm(x, ones.to("meta"), ones, epsilon=0.0)
    monkeypatch.setenv("FASTRL_CHECK", "1")
    with pytest.raises(NumericsError, match="expected x without NaN"):
        rms_norm(x * torch.nan, ones, epsilon=0.0)
