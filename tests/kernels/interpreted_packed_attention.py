"""packed_attention's Triton kernels against the float64 reference; run by test_triton.py."""

import pytest
import torch
from fastrl_kernels.triton import packed_attention as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import packed_attention
from fastrl.ops.packed_attention import packed_attention_reference

FLOOR = 4e-6  # float32 sums in another order
# The interpreter cuts a float32 to half precision where a GPU rounds: one more unit.
FLOORS = {torch.float32: FLOOR, torch.float16: 2**-10, torch.bfloat16: 2**-7}


class Case:
    """Inputs of one call, and the weights of its outputs in the loss."""

    def __init__(self, lengths: list[int], heads: tuple[int, int] = (2, 1), C: int = 16,
                 dtype: torch.dtype = torch.float32) -> None:
        N, (Hq, Hk) = sum(lengths), heads
        self.inputs = [torch.randn(N, H, C).to(dtype) for H in (Hq, Hk, Hk)]
        self.weights = torch.randn(N, Hq, C).to(dtype)
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        self.max_seqlen = max(1, *lengths)
        self.dtype = dtype

    def run(self, function=packed_attention, dtype: torch.dtype | None = None,
            **options) -> list[Tensor]:
        """The output and the gradients of query, key and value."""
        leaves = [x.to(dtype or self.dtype).detach().requires_grad_() for x in self.inputs]
        out = function(*leaves, self.cu_seqlens, max_seqlen=self.max_seqlen,
                       **{"scale": 0.4, **options})
        (out * self.weights.to(out.dtype)).sum().backward()
        return [out, *(x.grad for x in leaves)]

    def assert_as_good_as_torch(self, size: float = 1.0, **options) -> None:
        """`size`: of what is added up to the gradients, which leaves its rounding."""
        truth = self.run(packed_attention_reference, torch.float64, **options)
        plain = self.run(packed_attention_reference, **options)
        ours = self.run(backend="triton", **options)
        floor = FLOORS[self.dtype]
        for wide, torch_result, result in zip(truth, plain, ours, strict=True):
            assert result.dtype == self.dtype and result.shape == wide.shape
            assert not result.isnan().any()
            if wide.numel() == 0:
                continue
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * (size + wide.abs().max())


# One token; below, at and above a block of 16; several blocks; empty sequences at every place.
@pytest.mark.parametrize("lengths", [[1], [15, 16, 17], [52, 5], [0, 0, 3, 0, 40, 0], [0, 0]],
                         ids=str)
def test_lengths(lengths: list[int]) -> None:
    Case(lengths).assert_as_good_as_torch()


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    Case([21, 7], heads).assert_as_good_as_torch()


@pytest.mark.parametrize("C", [1, 8, 20, 80, 160, 256])
def test_channels(C: int) -> None:
    Case([19, 2], C=C).assert_as_good_as_torch(scale=C**-0.5)


# Itself alone; within a block; a block; a block of keys whose last query begins a block; beyond two
# blocks; as long as the sequence.
@pytest.mark.parametrize("window", [1, 5, 16, 18, 37, 52])
def test_window(window: int) -> None:
    Case([52, 5, 33], (1, 1)).assert_as_good_as_torch(window=window)


# Several tiles of the sizes of half precision, in both directions, with and without a window.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("C", [8, 96])
def test_half_precision(dtype: torch.dtype, window: int | None, C: int) -> None:
    Case([150, 3, 65], C=C, dtype=dtype).assert_as_good_as_torch(scale=C**-0.5, window=window)


def test_views_of_a_merged_tensor_and_channels_apart() -> None:
    case = Case([20, 13], (2, 1), 8)
    expected = case.run(backend="triton")
    merged = torch.cat(case.inputs, dim=1).requires_grad_()
    spread = torch.stack([merged, torch.full_like(merged, torch.nan)], dim=-1)[..., 0]
    flipped = merged.transpose(0, 2).contiguous().transpose(0, 2)
    for views in (merged, spread, flipped):
        parts = views.split([2, 1, 1], dim=1)
        out = packed_attention(*parts, case.cu_seqlens, max_seqlen=20, scale=0.4, backend="triton")
        (gradient,) = torch.autograd.grad((out * case.weights).sum(), merged, retain_graph=True)
        assert torch.equal(out, expected[0])
        assert torch.equal(gradient, torch.cat(expected[1:], dim=1))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_sequence_keeps_its_bits_in_every_pack(dtype: torch.dtype, window: int | None) -> None:
    lengths = [37, 5, 50, 0, 16]
    case = Case(lengths, (1, 1), 8, dtype)
    together = case.run(backend="triton", window=window)
    order = [4, 2, 0, 3, 1]
    for members in ([2], [0, 1], order):
        assert_same_bits(case, together, lengths, members, window)


def assert_same_bits(case: Case, together: list[Tensor], lengths: list[int], members: list[int],
                     window: int | None) -> None:
    """`together`, of all sequences, has the bits of a pack of `members` in their order."""
    starts = case.cu_seqlens.tolist()
    rows = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in members])
    packed = Case([lengths[b] for b in members], dtype=case.dtype)
    packed.inputs = [x[rows] for x in case.inputs]
    packed.weights = case.weights[rows]
    packed.max_seqlen = 50
    for a, b in zip(packed.run(backend="triton", window=window), together, strict=True):
        assert torch.equal(a, b[rows])


def test_a_token_keeps_its_bits_when_the_sequence_grows() -> None:
    case = Case([50], (1, 1), 8)
    long = case.run(backend="triton")[0]
    for length in (1, 16, 17, 49):
        short = packed_attention(*(x[:length] for x in case.inputs), torch.tensor([0, length]),
                                 max_seqlen=length, scale=0.4, backend="triton")
        assert torch.equal(short, long[:length])


@pytest.mark.parametrize("window", [None, kernels.SPLIT + 20])
def test_splits_of_the_keys(window: int | None) -> None:
    Case([kernels.SPLIT + 70, 3], (1, 1), 8, torch.float16).assert_as_good_as_torch(window=window)


def test_splits_change_no_bits_of_a_sequence_that_has_one() -> None:
    case = Case([150, 3, 65], (1, 1), 8, torch.float16)
    for window in (None, 50):
        with_splits, without = (kernels.packed_attention_fwd(
            *case.inputs, case.cu_seqlens, 0.4, window, has_splits) for has_splits in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(with_splits, without, strict=True))


def test_many_sequences() -> None:
    # More than a program looks at together, so that its search takes several steps.
    lengths = [0] * (kernels.SEARCHED.value + 3) + [2, 0, 1]
    case = Case(lengths, (1, 1), 8)
    out = packed_attention(*case.inputs, case.cu_seqlens, max_seqlen=2, scale=0.4,
                           backend="triton")
    torch.testing.assert_close(out, packed_attention_reference(
        *case.inputs, case.cu_seqlens, max_seqlen=2, scale=0.4))


def test_large_scores_do_not_overflow() -> None:
    case = Case([40, 7])
    case.inputs[0] *= 300
    case.assert_as_good_as_torch(size=300.0, scale=1.0)


def test_the_future_and_the_neighbours_are_not_seen() -> None:
    case = Case([30, 20, 30], (2, 2), 8)
    for x in case.inputs:
        x.requires_grad_()
    out = packed_attention(*case.inputs, case.cu_seqlens, max_seqlen=30, scale=0.4, window=9,
                           backend="triton")
    dquery, dkey, dvalue = torch.autograd.grad(out[45].sum(), case.inputs)
    assert dquery.abs().sum((1, 2)).nonzero().flatten().tolist() == [45]
    for gradient in (dkey, dvalue):  # token 15 of its sequence sees tokens 7 to 15
        assert gradient.abs().sum((1, 2)).nonzero().flatten().tolist() == list(range(37, 46))


def test_log_sum_exp() -> None:
    case = Case([20, 9], (2, 1))
    query, key, _ = case.inputs
    _, lse = kernels.packed_attention_fwd(*case.inputs, case.cu_seqlens, 0.4, None)
    scores = 0.4 * torch.einsum("ihc,jc->hij", query[:20].double(), key[:20, 0].double())
    scores = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), -torch.inf)
    expected = scores.logsumexp(-1) / torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(lse[:, :20].double(), expected, rtol=1e-6, atol=1e-6)


def test_registered_ops() -> None:
    case = Case([20, 0, 9], (2, 1), 8)
    for window in (None, 4):
        arguments = (*case.inputs, case.cu_seqlens, 0.4, window)
        torch.library.opcheck(torch.ops.fastrl_kernels.packed_attention, arguments)
        out, lse = kernels.packed_attention_fwd(*arguments)
        torch.library.opcheck(torch.ops.fastrl_kernels.packed_attention_bwd,
                              (case.weights, *case.inputs, case.cu_seqlens, out, lse, 0.4, window))


def test_compiles_to_one_graph() -> None:
    case = Case([20, 0, 9], (2, 1), 8)
    compiled = torch.compile(packed_attention, fullgraph=True, backend="aot_eager")
    traced = case.run(compiled, backend="triton", window=6)
    for a, b in zip(case.run(backend="triton", window=6), traced, strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    x, cu_seqlens = torch.randn(3, 1, 4), torch.tensor([0, 3])
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        packed_attention(*[x.double()] * 3, cu_seqlens, max_seqlen=3, scale=1.0, backend="triton")
    with pytest.raises(BackendUnavailableError, match="at most 256 channels per head, these have "
                                                      "257"):
        packed_attention(*[torch.randn(3, 1, 257)] * 3, cu_seqlens, max_seqlen=3, scale=1.0,
                         backend="triton")
