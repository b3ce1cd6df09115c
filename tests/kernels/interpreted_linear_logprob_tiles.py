"""linear_logprobs without logits in memory against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton import linear_logprob_tiles as kernels
from fastrl_kernels.triton.linear_logprob_tiles import SLICE, tile_settings, tiled_logprobs
from torch import Tensor

from fastrl.ops import linear_logprobs
from fastrl.ops.linear_logprob import linear_logprobs_reference

FLOOR = 2e-6  # float32 sums in another order
TILE = tile_settings(torch.float32, 7)


class Case:
    """Inputs of one call."""

    def __init__(self, M: int = 9, D: int = 7, V: int = 130,
                 dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
        self.bias: Tensor | None = torch.randn(V).to(dtype)
        self.token_ids = torch.randint(V, (M,))

    def run(self, function=linear_logprobs, double: bool = False, **options) -> list[Tensor]:
        hidden, weight, bias = (x.double() if double and x is not None else x
                                for x in (self.hidden, self.weight, self.bias))
        return [*function(hidden, weight, self.token_ids, bias=bias, **options)]

    def ours(self, **options) -> list[Tensor]:
        return self.run(backend="triton", logits="none", **options)

    def assert_as_good_as_torch(self, floor: float = FLOOR, **options) -> None:
        truth = self.run(linear_logprobs_reference, double=True, **options)
        plain = self.run(linear_logprobs_reference, **options)
        for wide, torch_result, result in zip(truth, plain, self.ours(**options), strict=True):
            assert result.dtype == torch.float32 and result.shape == wide.shape
            assert torch.equal(result.isinf(), wide.isinf()) and not result.isnan().any()
            error, torch_error = ((x - wide).nan_to_num().abs().max()
                                  for x in (result, torch_result))
            largest = wide.masked_fill(wide.isinf(), 0.0).abs().max()
            assert error <= 2 * torch_error + floor * largest


# One of each; a tile exactly, and one more in every direction; two slices and a little more.
@pytest.mark.parametrize("M, D, V", [
    (1, 1, 1), (9, 7, 130), (TILE["BLOCK_M"], TILE["BLOCK_D"], TILE["BLOCK_V"]),
    (TILE["BLOCK_M"] + 1, TILE["BLOCK_D"] + 1, TILE["BLOCK_V"] + 1), (3, 40, 2 * SLICE + 5),
    (2, 4, SLICE)])
def test_sizes(M: int, D: int, V: int) -> None:
    Case(M, D, V).assert_as_good_as_torch()


# GPT-2's, which no tile divides; and one that ends as Qwen's 151936 does: 384 columns, three tiles
# of 128, in the last slice.
@pytest.mark.parametrize("V", [50257, 3 * SLICE + 384])
def test_many_slices(V: int) -> None:
    case = Case(M=2, D=2, V=V, dtype=torch.float16)
    case.token_ids = torch.tensor([V - 1, V // SLICE * SLICE])
    case.assert_as_good_as_torch()


def test_without_a_bias() -> None:
    case = Case()
    case.bias = None
    case.assert_as_good_as_torch()


def test_temperature() -> None:
    Case(V=2 * SLICE + 5).assert_as_good_as_torch(temperature=0.6)


# The operands are rounded already; what is added up is float32. Two slices, some steps along D.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("D", [70, 80])
def test_half_precision(dtype: torch.dtype, D: int) -> None:
    Case(D=D, V=SLICE + 130, dtype=dtype).assert_as_good_as_torch()


def test_two_dtypes() -> None:
    case = Case()
    case.hidden = case.hidden.bfloat16()
    case.assert_as_good_as_torch()


def test_not_contiguous() -> None:
    case = Case()
    case.hidden = case.hidden.t().contiguous().t()
    case.weight = case.weight.t().contiguous().t()
    case.token_ids = case.token_ids.repeat_interleave(2)[::2]
    case.bias = case.bias.repeat_interleave(2)[::2]
    case.assert_as_good_as_torch()


def test_forbidden_tokens_and_whole_slices_of_them() -> None:
    case = Case(M=6, V=2 * SLICE + 9)
    case.bias[::3] = -torch.inf
    case.bias[:SLICE] = -torch.inf
    case.token_ids = torch.tensor([SLICE, SLICE + 2, 2 * SLICE + 8, SLICE + 3, 5, 3])
    case.assert_as_good_as_torch()
    case.bias[SLICE:] = 0.0
    case.bias[SLICE + 9:] = -torch.inf  # later slices may be empty as well
    case.assert_as_good_as_torch()


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|All-NaN):RuntimeWarning")
def test_nothing_allowed_is_nan_and_nan_is_not_hidden() -> None:
    case = Case(V=SLICE + 9)
    case.bias[:] = -torch.inf
    assert all(x.isnan().all() for x in case.ours())
    case = Case(V=SLICE + 9)
    case.hidden[2] = torch.nan
    for result in case.ours():
        assert result.isnan().tolist() == [m == 2 for m in range(9)]


def test_a_token_outside_the_vocabulary_is_nan_and_reads_nothing() -> None:
    case = Case(M=2, V=SLICE + 9)
    case.token_ids = torch.tensor([-1, SLICE + 9])
    logprobs, entropy = case.ours()
    assert logprobs.isnan().all() and entropy.isfinite().all()


def test_extreme_logits_keep_their_precision() -> None:
    case = Case(D=1)
    case.hidden[:], case.weight[:] = 100.0, 100.0
    case.assert_as_good_as_torch()


def test_no_tokens() -> None:
    assert [x.shape for x in Case(M=0).ours()] == [(0,), (0,)]


def test_a_row_does_not_depend_on_the_others() -> None:
    case = Case(M=TILE["BLOCK_M"] + 5, D=40, V=SLICE + 130)
    together = tiled_logprobs(case.hidden, case.weight, case.bias, case.token_ids, 0.7)
    for m in (0, 5, TILE["BLOCK_M"] + 2):
        alone = tiled_logprobs(case.hidden[m:m + 1], case.weight, case.bias,
                               case.token_ids[m:m + 1], 0.7)
        assert all(torch.equal(a[0], t[m]) for a, t in zip(alone, together, strict=True))


def test_the_backward_pass_takes_over_the_statistics() -> None:
    case, gradients = Case(V=SLICE + 9), []
    for options in ({"backend": "torch"}, {"backend": "triton", "logits": "none"}):
        leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
        logprobs, entropy = linear_logprobs(*leaves[:2], case.token_ids, bias=leaves[2],
                                            chunk_tokens=4, temperature=0.7, **options)
        (logprobs.sum() - 2 * entropy[1]).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients)


def test_no_chunk_of_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch, "empty",
                        lambda *shape, **options: made.append(shape) or torch.zeros(*shape,
                                                                                    **options))
    case = Case(M=64, V=SLICE + 1)
    with torch.no_grad():
        case.ours()
    assert max(torch.Size(shape).numel() for shape in made if not isinstance(shape[0], tuple)) \
        == 2 * 4 * 64


def test_registered_op() -> None:
    case = Case()
    torch.library.opcheck(torch.ops.fastrl_kernels.linear_logprobs,
                          (case.hidden, case.weight, case.bias, case.token_ids, 0.7, None, "none",
                           False))


def test_compiles_to_one_graph() -> None:
    case = Case()
    compiled = torch.compile(linear_logprobs, fullgraph=True, backend="aot_eager")
    eager = case.ours()
    traced = case.run(compiled, backend="triton", logits="none")
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))


def test_refusals_are_those_of_linear_logprobs() -> None:
    assert kernels.supports("cuda", torch.float64) is not None
