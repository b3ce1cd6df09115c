"""linear_kl with its Triton kernels against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton import linear_kl as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import linear_kl
from fastrl.ops.linear_kl import linear_kl_reference

FLOOR = 3e-6  # float32 sums in another order
DIRECTIONS = ("reverse", "forward")
NAMES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")


class Case:
    """Inputs of one call; the reference is another model of another width."""

    def __init__(self, M: int = 9, D: int = 7, V: int = 130,
                 dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
        self.bias: Tensor | None = torch.randn(V).to(dtype)
        self.ref_hidden = torch.randn(M, D + 2).to(dtype)
        self.ref_weight = torch.randn(V, D + 2).to(dtype)
        self.ref_bias: Tensor | None = torch.randn(V).to(dtype)

    def run(self, function=linear_kl, double: bool = False, **options) -> list[Tensor]:
        """KL, and the gradients of the policy's inputs for row weights of both signs."""
        values = [None if x is None else (x.double() if double else x)
                  for x in (getattr(self, name) for name in NAMES)]
        leaves = [None if x is None else x.detach().requires_grad_() for x in values[:3]]
        hidden, weight, bias = leaves
        kl = function(hidden, weight, *values[3:5], bias=bias, ref_bias=values[5], **options)
        (kl * torch.linspace(-1, 2, len(hidden), dtype=kl.dtype)).sum().backward()
        return [kl, *(x.grad for x in leaves if x is not None)]

    def assert_as_good_as_torch(self, floor: float = FLOOR, chunk_tokens: int | None = None,
                                **options) -> None:
        truth = self.run(linear_kl_reference, double=True, **options)
        plain = self.run(linear_kl_reference, **options)
        ours = self.run(backend="triton", chunk_tokens=chunk_tokens, **options)
        for wide, torch_result, result in zip(truth, plain, ours, strict=True):
            assert result.dtype == torch_result.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * wide.abs().max()


# One of each; chunks of one, of unequal size, of all; a vocabulary of several blocks.
@pytest.mark.parametrize("M, D, V, chunk_tokens", [(1, 1, 1, None), (9, 7, 130, 1), (9, 7, 130, 4),
                                                   (9, 7, 130, None), (3, 4, 9001, 2)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sizes(M: int, D: int, V: int, chunk_tokens: int | None, direction: str) -> None:
    Case(M, D, V).assert_as_good_as_torch(chunk_tokens=chunk_tokens, direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("absent", [("bias",), ("ref_bias",), ("bias", "ref_bias")])
def test_without_a_bias(direction: str, absent: tuple[str, ...]) -> None:
    case = Case()
    for name in absent:
        setattr(case, name, None)
    case.assert_as_good_as_torch(direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_temperature(direction: str) -> None:
    Case().assert_as_good_as_torch(temperature=0.6, direction=direction)


# The gradient of the logits lies in half of each row, over several blocks. The interpreter cuts a
# float32 to bfloat16 where a GPU rounds: 2^-8 of each addend, and rows of both signs cancel.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-10), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_half_precision(dtype: torch.dtype, floor: float, direction: str) -> None:
    Case(V=9001, dtype=dtype).assert_as_good_as_torch(floor, chunk_tokens=4, direction=direction)


def test_two_dtypes() -> None:
    case = Case()
    case.ref_hidden, case.ref_weight = case.ref_hidden.bfloat16(), case.ref_weight.bfloat16()
    case.assert_as_good_as_torch()


def test_not_contiguous() -> None:
    case = Case()
    for name in NAMES:
        strided = getattr(case, name).repeat_interleave(2, dim=-1)[..., ::2]
        assert not strided.is_contiguous()
        setattr(case, name, strided)
    case.assert_as_good_as_torch(chunk_tokens=4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tokens_forbidden_by_both_and_whole_blocks_of_them(direction: str) -> None:
    case = Case(V=9001)
    case.bias[::3] = case.ref_bias[::3] = -torch.inf
    case.bias[:4097] = case.ref_bias[:4097] = -torch.inf
    case.assert_as_good_as_torch(direction=direction)
    case.bias[4096:] = case.ref_bias[4096:] = -torch.inf
    case.bias[:7] = case.ref_bias[:7] = 0.0
    case.assert_as_good_as_torch(direction=direction)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_only_one_forbids() -> None:
    """The second alone: infinitely far, in any block. The first alone: nothing special."""
    for column in (0, 5000, 8999):
        case = Case(M=2, V=9001)
        case.ref_bias[column] = -torch.inf
        assert (case.run(backend="triton")[0] == torch.inf).all()
        case.assert_as_good_as_torch(direction="forward")
        case = Case(M=2, V=9001)
        case.bias[column] = -torch.inf
        assert (case.run(backend="triton", direction="forward")[0] == torch.inf).all()
        case.assert_as_good_as_torch()
    case = Case(M=2, V=9001)  # the reference forbids its whole first block
    case.ref_bias[:4096] = -torch.inf
    assert (case.run(backend="triton")[0] == torch.inf).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_nan_is_not_hidden(direction: str) -> None:
    for name in ("hidden", "ref_hidden"):
        case = Case()
        getattr(case, name)[2] = torch.nan
        kl = case.run(backend="triton", direction=direction)[0]
        assert kl.isnan().tolist() == [m == 2 for m in range(9)]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_extreme_logits_keep_their_precision(direction: str) -> None:
    """Maxima that jump by more than 1e4 from block to block, in one model, the other, or both."""
    for jump, ref_jump in ((3e4, 6e4), (0.0, 3e4), (3e4, 0.0)):
        case = Case(M=2, D=1, V=2 * 4096)
        case.hidden, case.ref_hidden = torch.ones(2, 1), torch.zeros(2, 3)
        case.bias, case.ref_bias = torch.randn(2, 2 * 4096)
        case.bias[4096:] += jump
        case.ref_bias[4096:] += ref_jump
        case.assert_as_good_as_torch(direction=direction)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_what_rounds_to_probability_0_adds_nothing_even_where_it_is_forbidden() -> None:
    case = Case(M=2, V=2 * 4096)
    case.bias[4096:] += 3e4  # only then is it known that nothing before it counts
    case.ref_bias[0] = -torch.inf
    case.assert_as_good_as_torch()


def test_equal_models_are_at_distance_zero() -> None:
    case = Case(V=9001)
    case.ref_hidden, case.ref_weight, case.ref_bias = case.hidden, case.weight, case.bias
    for direction in DIRECTIONS:
        kl, *gradients = case.run(backend="triton", direction=direction)
        assert kl.abs().max() == 0 and all(x.abs().max() == 0 for x in gradients)


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case()
    together = case.run(backend="triton", chunk_tokens=1)[0]
    case.hidden, case.ref_hidden = case.hidden[3:4], case.ref_hidden[3:4]
    assert torch.equal(case.run(backend="triton", chunk_tokens=1)[0][0], together[3])


def test_no_tokens_and_only_the_gradients_asked_for() -> None:
    kl, *gradients = Case(M=0).run(backend="triton")
    assert kl.shape == (0,) and all((gradient == 0).all() for gradient in gradients)
    case = Case()
    weight, ref_weight = case.weight.requires_grad_(), case.ref_weight.requires_grad_()
    linear_kl(case.hidden, weight, case.ref_hidden, ref_weight, backend="triton").sum().backward()
    assert weight.grad is not None and case.hidden.grad is None and ref_weight.grad is None


def test_one_chunk_of_logits_of_each_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(M=64, V=500), []
    new_chunk = kernels.new_chunk
    monkeypatch.setattr(kernels, "new_chunk",
                        lambda *args: made.append(new_chunk(*args)) or made[-1])
    case.run(backend="triton", chunk_tokens=8)
    assert [tuple(buffer.shape) for buffer in made] == [(8, 500)] * 4


def test_registered_ops() -> None:
    case = Case()
    inputs = tuple(getattr(case, name) for name in NAMES)
    for direction, needs in (("reverse", [True, True, True]), ("forward", [False, True, False])):
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_kl, (*inputs, 0.7, direction, 4))
        stats = kernels.linear_kl_fwd(*inputs, 0.7, direction, 4)
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_kl_bwd,
                              (*inputs, stats, torch.randn(9), 0.7, direction, 4, needs))


def test_compiles_to_one_graph() -> None:
    case = Case()
    compiled = torch.compile(linear_kl, fullgraph=True, backend="aot_eager")
    for a, b in zip(case.run(backend="triton"), case.run(compiled, backend="triton"), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        Case().run(double=True, backend="triton")
