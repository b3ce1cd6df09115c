"""linear: values, gradients, refusals."""

import pytest
import torch
import torch.nn.functional as F

from fastrl.errors import NumericsError, ShapeError
from fastrl.ops import linear


def test_golden() -> None:
    x, weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 4.0], [0.5, 1.0]])
    assert linear(x, weight).tolist() == [[11.0, 2.5], [-4.0, -1.0]]
    assert linear(x, weight, torch.tensor([1.0, -2.0])).tolist() == [[12.0, 0.5], [-3.0, -3.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_is_the_module_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(*shape).to(dtype).requires_grad_()
                       for shape in ((3, 5, 40), (24, 40), (24,)))
    results = [(y, *torch.autograd.grad(y.float().sin().sum(), (x, weight, bias)))
               for y in (linear(x, weight, bias), F.linear(x, weight, bias))]
    assert all(map(torch.equal, *results))


def test_wide_results() -> None:
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((3, 40), (24, 40), (24,)))
    y = linear(x, weight, bias, out_dtype=torch.float32)
    assert torch.equal(y, F.linear(x.float(), weight.float(), bias.float()))


def test_gradients() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True)
              for shape in ((2, 3, 4), (5, 4), (5,))]
    assert torch.autograd.gradcheck(linear, inputs)


def test_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    with pytest.raises(ShapeError, match=r"x \[..., D\] and weight \[O, D\], got \[2, 3\] and \[4"):
        linear(x, torch.ones(4, 2))
    with pytest.raises(ShapeError, match=r"bias \[O\] with O = 4, got \[3\]"):
        linear(x, weight, torch.ones(3))
    with pytest.raises(ShapeError, match="one dtype, got x torch.float32, weight torch.float16"):
        linear(x, weight.half())
    with pytest.raises(ShapeError, match="to be floating point"):
        linear(x.long(), weight)
    with pytest.raises(ShapeError, match="out_dtype torch.float16 or torch.float32, got torch.bf"):
        linear(x.half(), weight.half(), out_dtype=torch.bfloat16)
    monkeypatch.setenv("FASTRL_CHECK", "1")
    with pytest.raises(NumericsError, match="linear: expected weight without NaN"):
        linear(x, weight * torch.nan)
