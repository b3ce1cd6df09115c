"""swiglu and gelu: values, casts, gradients, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.errors import ConfigError, NumericsError, ShapeError
from fastrl.ops import gelu, swiglu


def test_golden() -> None:
    # silu(ln 3) = ln 3 * 3/4, silu(-ln 3) = -ln 3 / 4; Phi(1) = 0.8413447461.
    log3 = math.log(3)
    gate_up = torch.tensor([[log3, -log3, 0.0, 4.0, 8.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([[3 * log3, -2 * log3, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(swiglu(gate_up), expected, rtol=1e-15, atol=0)
    x = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    assert gelu(x).tolist() == pytest.approx([0.8413447461, 0.0, -0.1586552539], abs=1e-10)
    assert gelu(x, approximate="tanh").tolist() == pytest.approx(
        [0.8411919906, 0.0, -0.1588080094], abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_two_halves_bit_for_bit(dtype: torch.dtype) -> None:
    gate_up = torch.randn(7, 3, 40).to(dtype).requires_grad_()
    gate, up = gate_up.chunk(2, dim=-1)
    expected, got = F.silu(gate) * up, swiglu(gate_up)
    assert torch.equal(got, expected)
    gradients = [torch.autograd.grad(y.float().sin().sum(), gate_up)[0] for y in (expected, got)]
    assert torch.equal(*gradients)


def test_silu_is_rounded_before_the_product() -> None:
    gate, up = torch.randn(2, 200).bfloat16()
    expected = (F.silu(gate.float()).bfloat16().float() * up.float()).bfloat16()
    assert torch.equal(swiglu(torch.cat([gate, up])), expected)


def test_gradients() -> None:
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(swiglu, x)
    assert torch.autograd.gradcheck(gelu, x)
    assert torch.autograd.gradcheck(lambda x: gelu(x, approximate="tanh"), x)


def test_extremes() -> None:
    x = torch.tensor([-1e4, 1e4])
    for approximate in ("none", "tanh"):
        assert gelu(x, approximate=approximate).tolist() == [0.0, 1e4]
    assert swiglu(torch.tensor([-1e4, 1e4, 1.0, 1.0])).tolist() == [0.0, 1e4]


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShapeError, match=r"expected gate_up \[..., 2I\], got \[2, 3\]"):
        swiglu(torch.ones(2, 3))
    with pytest.raises(ShapeError, match=r"expected x \[..., I\], got \[\]"):
        gelu(torch.ones(()))
    with pytest.raises(ShapeError, match="to be floating point"):
        gelu(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="expected approximate none or tanh, got 'erf'"):
        gelu(torch.ones(2), approximate="erf")  # type: ignore[arg-type]
    monkeypatch.setenv("FASTRL_CHECK", "1")
    nan: Tensor = torch.tensor([1.0, torch.nan])
    with pytest.raises(NumericsError, match="swiglu: expected x without NaN"):
        swiglu(nan)


def test_swiglu_has_the_same_bits_without_a_gradient_and_leaves_its_input() -> None:
    gate_up = torch.randn(33, 2 * 17)
    kept = gate_up.clone()
    with_gradient = swiglu(gate_up.clone().requires_grad_())
    assert with_gradient.requires_grad and torch.equal(swiglu(gate_up), with_gradient)
    assert torch.equal(gate_up, kept)
