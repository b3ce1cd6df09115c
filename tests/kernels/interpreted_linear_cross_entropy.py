"""linear_cross_entropy with its Triton kernel against the float64 reference; run by
test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton import linear_cross_entropy as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import linear_cross_entropy
from fastrl.ops.linear_cross_entropy import linear_cross_entropy_reference

FLOOR = 3e-6  # float32 sums in another order


class Case:
    """Inputs of one call; a third of the tokens masked, weights of both signs and 0."""

    def __init__(self, M: int = 9, D: int = 7, V: int = 130,
                 dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
        self.bias: Tensor | None = torch.randn(V).to(dtype)
        self.token_ids = torch.randint(V, (M,))
        self.loss_mask: Tensor | None = torch.arange(M) % 3 != 1
        self.token_weights: Tensor | None = torch.randn(M) * (torch.arange(M) % 5 != 4)

    def run(self, function=linear_cross_entropy, double: bool = False, **options) -> list[Tensor]:
        """The loss, and the gradients of hidden, weight and, where there is one, bias."""
        leaves = [None if x is None else (x.double() if double else x).detach().requires_grad_()
                  for x in (self.hidden, self.weight, self.bias)]
        loss = function(*leaves[:2], self.token_ids, self.loss_mask, bias=leaves[2],
                        token_weights=self.token_weights, **{"denominator": 7.0, **options})
        (3 * loss).backward()
        return [loss, *(x.grad for x in leaves if x is not None)]

    def assert_as_good_as_torch(self, floor: float = FLOOR, chunk_tokens: int | None = None,
                                **options) -> None:
        truth = self.run(linear_cross_entropy_reference, double=True, **options)
        plain = self.run(linear_cross_entropy_reference, **options)
        ours = self.run(backend="triton", chunk_tokens=chunk_tokens, **options)
        for wide, torch_result, result in zip(truth, plain, ours, strict=True):
            assert result.dtype == torch_result.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * (wide.abs().max() + 1e-30)


# One of each; chunks of one, of unequal size, of all; a vocabulary of several blocks.
@pytest.mark.parametrize("M, D, V, chunk_tokens", [(1, 1, 2, None), (9, 7, 130, 1), (9, 7, 130, 4),
                                                   (9, 7, 130, None), (3, 4, 9001, 2)])
def test_sizes(M: int, D: int, V: int, chunk_tokens: int | None) -> None:
    Case(M, D, V).assert_as_good_as_torch(chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("absent", [("loss_mask",), ("token_weights",), ("bias",),
                                    ("loss_mask", "token_weights", "bias")])
def test_what_may_be_left_out(absent: tuple[str, ...]) -> None:
    case = Case()
    for name in absent:
        setattr(case, name, None)
    case.assert_as_good_as_torch(chunk_tokens=4)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"denominator": 1e5}])
def test_coefficients(options: dict[str, float]) -> None:
    Case().assert_as_good_as_torch(**options)


# As in linear_policy_loss: the gradient lies in half of each row, and keeps its digits in float16.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-9), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("denominator", [7.0, 1e4])
def test_half_precision(dtype: torch.dtype, floor: float, denominator: float) -> None:
    Case(V=9001, dtype=dtype).assert_as_good_as_torch(floor, chunk_tokens=4,
                                                      denominator=denominator)


def test_masked_rows_may_hold_anything() -> None:
    case = Case()
    expected = case.run(backend="triton")
    for values in (case.hidden, case.token_weights):
        values[~case.loss_mask] = torch.nan
    got = case.run(backend="triton")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert (got[1][~case.loss_mask] == 0).all()


def test_nothing_counts_and_no_tokens() -> None:
    masked, empty = Case(), Case(M=0)
    masked.loss_mask[:] = False
    for case in (masked, empty):
        loss, *gradients = case.run(backend="triton")
        assert loss.item() == 0 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_in_a_row_that_counts_is_not_hidden() -> None:
    for name in ("hidden", "token_weights"):
        case = Case()
        getattr(case, name)[0] = torch.nan
        assert case.run(backend="triton")[0].isnan(), name


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_forbidden_tokens_one_of_them_taken_with_weight_0() -> None:
    case = Case()
    case.bias[::3] = -torch.inf
    case.token_ids = (case.token_ids // 3 * 3 + 1).clamp(max=128)
    case.token_ids[0], case.token_weights[0] = 0, 0.0
    case.assert_as_good_as_torch()
    case.token_weights[0] = 1.0
    assert case.run(backend="triton")[0] == torch.inf


def test_not_contiguous() -> None:
    case = Case()
    for name in ("hidden", "weight", "bias", "token_ids", "loss_mask", "token_weights"):
        strided = getattr(case, name).repeat_interleave(2, dim=-1)[..., ::2]
        assert not strided.is_contiguous()
        setattr(case, name, strided)
    case.assert_as_good_as_torch(chunk_tokens=4)


def test_a_token_does_not_depend_on_the_others() -> None:
    case, logits = Case(), torch.randn(9, 300)
    inputs = [case.token_ids, case.loss_mask, case.token_weights]
    together = torch.full((9,), torch.nan)
    all_gradients = kernels.cross_entropy_of_logits(logits.clone(), *inputs, together, None,
                                                    torch.float32, 0.7)
    assert (all_gradients[~case.loss_mask] == 0).all()
    for m in range(9):
        alone, row = torch.full((1,), torch.nan), slice(m, m + 1)
        gradient = kernels.cross_entropy_of_logits(logits[row].clone(), *(x[row] for x in inputs),
                                                   alone, None, torch.float32, 0.7)
        assert torch.equal(alone[0], together[m])
        assert torch.equal(gradient[0], all_gradients[m])


def test_only_the_gradients_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    inputs = case.hidden, case.weight.requires_grad_(), case.token_ids
    linear_cross_entropy(*inputs, denominator=7.0, backend="triton").backward()
    assert case.weight.grad is not None and case.hidden.grad is None
    written: list[Tensor] = []
    monkeypatch.setattr(kernels, "gradient_view", lambda *args: written.append(args[0]))
    with torch.no_grad():
        loss = linear_cross_entropy(*inputs, denominator=7.0, backend="triton")
    assert not loss.requires_grad and not written


def test_one_chunk_of_logits_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(M=64, V=500), []
    new_chunk = kernels.new_chunk
    monkeypatch.setattr(kernels, "new_chunk",
                        lambda *args: made.append(new_chunk(*args)) or made[-1])
    case.run(backend="triton", chunk_tokens=8)
    assert [tuple(buffer.shape) for buffer in made] == [(8, 500)]


def test_registered_op() -> None:
    case = Case()
    inputs = (case.hidden, case.weight, case.bias, case.token_ids)
    for mask, weights, needs in ((case.loss_mask, case.token_weights, [True, True, True]),
                                 (None, None, [False, True, False])):
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_cross_entropy,
                              (*inputs, mask, weights, 0.9, 4, needs))


def test_compiles_to_one_graph() -> None:
    case = Case()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    eager, traced = case.run(backend="triton"), case.run(compiled, backend="triton")
    torch.testing.assert_close(traced, eager, rtol=1e-6, atol=0)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        Case().run(double=True, backend="triton")
