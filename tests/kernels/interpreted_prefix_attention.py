"""prefix_attention's Triton kernels against the float64 reference, and packed_attention's bits."""

import pytest
import torch
from fastrl_kernels.triton import packed_attention as packed
from fastrl_kernels.triton import prefix_attention as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import packed_attention, prefix_attention
from fastrl.ops.prefix_attention import prefix_attention_reference

# float32 sums in another order; the interpreter cuts to half precision where a GPU rounds.
FLOORS = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# One token; around a block of 16; a group beside sequences by themselves, and no tokens.
GROUPS = [[(1, [1, 1])], [(17, [16, 18])], [(20, [5]), (6, []), (3, [0, 20])]]


class Case:
    """Inputs of one call, the weights of its outputs, and the rows of the unshared pack."""

    def __init__(self, groups: list[tuple[int, list[int]]], heads: tuple[int, int] = (2, 1),
                 C: int = 16, dtype: torch.dtype = torch.float32) -> None:
        lengths, prefixes, rows, self.whole, begin, keys = [], [], [], [0], 0, []
        for prefix_len, continuations in groups:
            number, prefix = len(lengths), range(begin, begin + prefix_len)
            lengths += [prefix_len, *continuations]
            prefixes += [-1, *[number] * len(continuations)]
            keys += [prefix_len, *(prefix_len + n for n in continuations)]
            begin += prefix_len
            for length in continuations or [0]:
                rows += [*prefix, *range(begin, begin + length)]
                self.whole.append(prefix_len + length)
                begin += length
        self.inputs = [torch.randn(begin, H, C).to(dtype) for H in (heads[0], heads[1], heads[1])]
        self.weights = torch.randn(begin, heads[0], C).to(dtype)
        self.bounds = (torch.tensor([0, *lengths]).cumsum(0), torch.tensor(prefixes))
        self.sizes = {"max_seqlen": max(keys), "num_keys": sum(keys)}
        self.rows, self.dtype = torch.tensor(rows), dtype

    def run(self, function=prefix_attention, dtype: torch.dtype | None = None,
            **options) -> list[Tensor]:
        """The output and the gradients of query, key and value."""
        leaves = [x.to(dtype or self.dtype).detach().requires_grad_() for x in self.inputs]
        out = function(*leaves, *self.bounds, **{**self.sizes, "scale": 0.4, **options})
        (out * self.weights.to(out.dtype)).sum().backward()
        return [out, *(x.grad for x in leaves)]

    def assert_as_good_as_torch(self, **options) -> None:
        truth = self.run(prefix_attention_reference, torch.float64, **options)
        plain = self.run(prefix_attention_reference, **options)
        ours = self.run(backend="triton", **options)
        for wide, torch_result, result in zip(truth, plain, ours, strict=True):
            assert result.dtype == self.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + FLOORS[self.dtype] * (1 + wide.abs().max())


@pytest.mark.parametrize("window", [None, 18])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_groups_and_windows(groups: list[tuple[int, list[int]]], window: int | None) -> None:
    Case(groups, (1, 1), 8).assert_as_good_as_torch(window=window)


@pytest.mark.parametrize(("heads", "C"), [((4, 2), 20), ((2, 1), 160)])
def test_heads_and_channels(heads: tuple[int, int], C: int) -> None:
    Case([(17, [7])], heads, C).assert_as_good_as_torch(scale=C**-0.5)


# Several tiles of the sizes of half precision, in both directions.
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [50])
def test_half_precision(dtype: torch.dtype, window: int | None) -> None:
    Case([(70, [140, 65])], (1, 1), 8, dtype).assert_as_good_as_torch(scale=0.3, window=window)


# Beyond a split too: the prefix ends within one, and a continuation passes it.
@pytest.mark.parametrize(("dtype", "groups"), [
    (torch.float32, [(37, [5, 20, 16])]), (torch.float16, [(70, [140, 65])]),
    (torch.float16, [(packed.SPLIT - 30, [20, 90])]), (torch.float16, [(530, [70])])], ids=str)
@pytest.mark.parametrize("window", [None, 40])
def test_a_token_has_the_bits_of_its_whole_sequence(
    dtype: torch.dtype, groups: list[tuple[int, list[int]]], window: int | None
) -> None:
    case = Case(groups, (1, 1), 8, dtype)
    shared = prefix_attention(*case.inputs, *case.bounds, **case.sizes, scale=0.4, window=window,
                              backend="triton")
    whole = packed_attention(*(x[case.rows] for x in case.inputs), torch.tensor(case.whole).cumsum(
        0), max_seqlen=max(case.whole), scale=0.4, window=window, backend="triton")
    assert torch.equal(shared[case.rows], whole)


def test_gradients_have_the_same_bits_every_time_and_in_every_pack() -> None:
    alone, first = Case([(17, [9, 3])], (2, 1), 8), Case([(6, [4, 5])], (2, 1), 8)
    beside = Case([(6, [4, 5]), (17, [9, 3])], (2, 1), 8)
    beside.inputs = [torch.cat(pair) for pair in zip(first.inputs, alone.inputs, strict=True)]
    beside.weights = torch.cat([first.weights, alone.weights])
    for a, b in zip(alone.run(backend="triton"), beside.run(backend="triton"), strict=True):
        assert torch.equal(a, b[15:])


def test_views_of_a_merged_tensor_and_channels_apart() -> None:
    case = Case([(5, [13, 4])], (2, 1), 8)
    expected = case.run(backend="triton")
    merged = torch.cat(case.inputs, dim=1).requires_grad_()
    for views in (merged, merged.transpose(0, 2).contiguous().transpose(0, 2)):
        out = prefix_attention(*views.split([2, 1, 1], dim=1), *case.bounds, **case.sizes,
                               scale=0.4, backend="triton")
        (gradient,) = torch.autograd.grad((out * case.weights).sum(), merged, retain_graph=True)
        assert torch.equal(out, expected[0])
        assert torch.equal(gradient, torch.cat(expected[1:], dim=1))


def test_many_continuations() -> None:
    # More than a program looks at together, so that its searches take several steps.
    case = Case([(3, []), (5, [0] * (kernels.SEARCHED.value + 3) + [1])], (1, 1), 8)
    case.assert_as_good_as_torch()


def test_registered_ops() -> None:
    case = Case([(5, [0, 9])], (2, 1), 8)
    arguments = (*case.inputs, *case.bounds, 0.4, 4)
    torch.library.opcheck(torch.ops.fastrl_kernels.prefix_attention, arguments)
    out, lse = kernels.prefix_attention_fwd(*arguments)
    torch.library.opcheck(torch.ops.fastrl_kernels.prefix_attention_bwd,
                          (case.weights, *case.inputs, *case.bounds, out, lse, 0.4, 4))


def test_compiles_to_one_graph() -> None:
    case = Case([(5, [0, 9])], (2, 1), 8)
    compiled = torch.compile(prefix_attention, fullgraph=True, backend="aot_eager")
    traced = case.run(compiled, backend="triton", window=6)
    for a, b in zip(case.run(backend="triton", window=6), traced, strict=True):
        assert torch.equal(a, b)


def test_refusals() -> None:
    case = Case([(2, [1])], (1, 1), 257)
    with pytest.raises(BackendUnavailableError, match="at most 256 channels per head"):
        case.run(backend="triton")
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        Case([(2, [1])], dtype=torch.float64).run(backend="triton")
