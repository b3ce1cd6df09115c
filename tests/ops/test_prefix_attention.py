"""prefix_attention against packed_attention of the whole sequences, and its reference."""

import inspect
from dataclasses import dataclass

import pytest
import torch
from fastrl_kernels.flash import prefix_attention as flash
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops import packed_attention
from fastrl.ops.prefix_attention import (
    key_rows,
    prefix_attention,
    prefix_attention_reference,
    varlen_arguments,
)

# (prefix, its continuations): equal and ragged; one token; one continuation; nothing shared;
# continuations without tokens; a sequence by itself between groups; many lengths.
GROUPS = [
    [(5, [3, 3, 3])], [(7, [1, 4, 9]), (2, [6, 2])], [(1, [1, 1])], [(4, [2])], [(6, []), (3, [])],
    [(3, [0, 2, 0]), (5, [])], [(4, [3, 1]), (6, []), (1, [8, 8])],
    [(9, [1, 2, 4, 8, 16, 32])],
]


@dataclass
class Case:
    """A shared pack, and the rows that make the unshared one of it."""

    inputs: list[Tensor]
    cu_seqlens: Tensor
    prefixes: Tensor
    rows: Tensor
    """Of the shared pack, in the order of the unshared: every prefix + continuation."""
    lengths: list[int]
    """Of the unshared sequences."""

    @property
    def options(self) -> dict[str, int]:
        """What the host knows: a prefix itself counts among the keys."""
        own = [int(n) for n in self.cu_seqlens.diff()]
        keys = [n + (own[p] if p >= 0 else 0)
                for n, p in zip(own, self.prefixes.tolist(), strict=True)]
        return {"max_seqlen": max(keys), "num_keys": sum(keys)}

    def shared(self, function=prefix_attention, **options) -> Tensor:
        return function(*self.inputs, self.cu_seqlens, self.prefixes,
                        **{**self.options, "scale": 0.3, **options})

    def unshared(self, **options) -> Tensor:
        """[rows]: packed_attention of whole sequences."""
        return packed_attention(
            *(x[self.rows] for x in self.inputs), torch.tensor([0, *self.lengths]).cumsum(0),
            **{"max_seqlen": max(self.lengths), "scale": 0.3, **options})


def make(groups: list[tuple[int, list[int]]], heads: tuple[int, int] = (4, 2), C: int = 8,
         dtype: torch.dtype = torch.float64) -> Case:
    generator = torch.Generator().manual_seed(1)
    segments, prefixes, rows, lengths, begin = [], [], [], [], 0
    for prefix_len, continuations in groups:
        prefix, number = list(range(begin, begin + prefix_len)), len(segments)
        segments += [prefix_len, *continuations]
        prefixes += [-1, *[number] * len(continuations)]
        begin += prefix_len
        for length in continuations or [0]:
            rows += [*prefix, *range(begin, begin + length)]
            lengths.append(prefix_len + length)
            begin += length
    inputs = [torch.randn(begin, H, C, generator=generator, dtype=dtype).requires_grad_()
              for H in (heads[0], heads[1], heads[1])]
    return Case(inputs, torch.tensor([0, *segments]).cumsum(0), torch.tensor(prefixes),
                torch.tensor(rows), lengths)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_equals_whole_sequences_and_the_reference_with_gradients(
    groups: list[tuple[int, list[int]]], heads: tuple[int, int], window: int | None
) -> None:
    case = make(groups, heads)
    out, reference = (case.shared(f, window=window)
                      for f in (prefix_attention, prefix_attention_reference))
    whole = case.unshared(window=window)
    torch.testing.assert_close(out, reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[case.rows], whole, rtol=1e-12, atol=1e-12)
    # A prefix's rows come back once per sequence in `whole`: so do their weights in the loss.
    weight = torch.randn_like(whole)
    once = torch.zeros_like(out).index_add(0, case.rows, weight)
    expected = torch.autograd.grad((whole * weight).sum(), case.inputs)
    for result in (out, reference):
        for grad, truth in zip(torch.autograd.grad((result * once).sum(), case.inputs), expected,
                               strict=True):
            torch.testing.assert_close(grad, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_that_of_the_reference_in_the_same_dtype(dtype: torch.dtype) -> None:
    case = make([(40, [9, 3, 17])], dtype=dtype)
    truth = Case([x.double() for x in case.inputs], case.cu_seqlens, case.prefixes, case.rows,
                 case.lengths).shared(prefix_attention_reference)
    out, plain = case.shared(), case.shared(prefix_attention_reference)
    assert out.dtype == dtype
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps


# Lengths around 16 and 4, beyond the 512 keys of a block; heads whose channels are not fours.
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("heads", "C"), [((4, 4), 8), ((6, 2), 8), ((3, 1), 6), ((2, 1), 64)])
@pytest.mark.parametrize("groups", [[(40, [1, 5, 17, 30])], [(100, [3, 150, 70]), (7, [1, 1])],
                                    [(16, [16, 16])], [(600, [64, 70])]], ids=str)
def test_a_row_of_float32_has_the_bits_that_it_has_in_a_whole_sequence(
    groups: list[tuple[int, list[int]]], heads: tuple[int, int], C: int, window: int | None
) -> None:
    case = make(groups, heads, C, torch.float32)
    assert torch.equal(case.shared(window=window)[case.rows], case.unshared(window=window))


def test_golden_values() -> None:
    # Keys 0: every visible key has the same weight, so outputs are means.
    query = torch.ones(5, 1, 1, dtype=torch.float64)
    value = torch.tensor([1.0, 3.0, 5.0, 8.0, 20.0], dtype=torch.float64).view(5, 1, 1)
    call = (query, 0 * query, value, torch.tensor([0, 2, 4, 5]), torch.tensor([-1, 0, 0]))
    out = prefix_attention(*call, max_seqlen=4, num_keys=9, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([1, 2, 3, 4.25, 8])
    out = prefix_attention(*call, max_seqlen=4, num_keys=9, scale=1.0, window=2)
    assert out.flatten().tolist() == pytest.approx([1, 2, 4, 6.5, 11.5])


def test_a_continuation_does_not_see_its_siblings() -> None:
    case = make([(4, [3, 5]), (2, [6])])
    grads = torch.autograd.grad(case.shared()[4:7].sum(), case.inputs)
    for grad in grads[1:]:
        assert grad.abs().sum((1, 2)).nonzero().flatten().tolist() == list(range(7))


def test_gradients_have_the_same_bits_every_time() -> None:
    case = make([(30, [9, 20, 4, 4])], dtype=torch.float32)
    first, second = (torch.autograd.grad(case.shared().square().sum(), case.inputs)
                     for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("groups", GROUPS, ids=str)
def test_keys_end_to_end_for_kernels_that_want_them(groups: list[tuple[int, list[int]]]) -> None:
    case = make(groups)
    rows, cu_seqlens_k = key_rows(case.cu_seqlens, case.prefixes, case.options["num_keys"])
    bounds, expected, begins = case.cu_seqlens.tolist(), [], [0]
    for b, prefix in enumerate(case.prefixes.tolist()):
        if prefix >= 0:
            expected += range(bounds[prefix], bounds[prefix + 1])
        expected += range(bounds[b], bounds[b + 1])
        begins.append(len(expected))
    assert rows.tolist() == expected and cu_seqlens_k.tolist() == begins


def test_keys_are_found_without_reading_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make([(5, [3, 2])])
    for name in ("tolist", "item", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a host read"))
    key_rows(case.cu_seqlens, case.prefixes, 20)


def test_flash_is_given_the_keys_of_every_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    from types import SimpleNamespace

    case = make([(5, [3, 2])], dtype=torch.float16)
    rows, cu_seqlens_k = key_rows(case.cu_seqlens, case.prefixes, 20)
    called: dict[str, Tensor] = {}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(
        flash_attn_varlen_func=lambda **arguments: called.update(arguments) or arguments["q"]))
    query, key, value = case.inputs
    flash.prefix_attention(query, key[rows], value[rows], case.cu_seqlens, 8, 0.3, None,
                           cu_seqlens_k=cu_seqlens_k)
    assert called["k"].shape[0] == 20 and called["causal"] is True
    assert called["cu_seqlens_q"].tolist() == [0, 5, 8, 10]
    assert called["cu_seqlens_k"].tolist() == [0, 5, 13, 20]
    assert called["cu_seqlens_k"].dtype == torch.int32
    arguments = varlen_arguments(query, key, value, case.cu_seqlens, 8, 0.3, None)
    assert "cu_seq_k" in inspect.signature(varlen_attn).bind(**arguments).arguments


def test_flash_is_refused_with_the_reason() -> None:
    with pytest.raises(BackendUnavailableError, match="'flash' cannot run here: "):
        make([(5, [3])]).shared(backend="flash")


# varlen; dense because of the channels; a window; several continuations without tokens.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("C", "window"), [(64, None), (20, None), (128, 33)])
def test_every_path_on_a_gpu(C: int, window: int | None, dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    case = make([(300, [64, 0, 70, 1]), (90, []), (17, [40, 200])], C=C, dtype=dtype)

    def run(function, type_: torch.dtype) -> list[Tensor]:
        there = Case([x.to("cuda", type_).detach().requires_grad_() for x in case.inputs],
                     case.cu_seqlens.cuda(), case.prefixes.cuda(), case.rows, case.lengths)
        out = there.shared(function, window=window, scale=C**-0.5)
        return [out, *torch.autograd.grad(out.square().sum(), there.inputs)]

    truth, plain = (run(prefix_attention_reference, t) for t in (torch.float64, dtype))
    again, ours = (run(prefix_attention, dtype) for _ in range(2))
    assert torch.equal(ours[0], again[0])
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
        floor = max(torch.finfo(dtype).eps, 4e-6)
        assert error <= 2 * torch_error + floor * (1 + wide.abs().max())


@pytest.mark.parametrize(("change", "message"), [
    ({"query": torch.zeros(7, 2)}, "prefix_attention: expected query"),
    ({"query": torch.zeros(6, 2, 8)}, "prefix_attention: query and key differ in tokens"),
    ({"prefixes": torch.tensor([-1, 0])}, r"expected prefixes \[3\] int64, .* got \[2\]"),
    ({"prefixes": torch.tensor([-1.0, 0, 0])}, r"expected prefixes \[3\] int64.*float32"),
    ({"num_keys": 6}, "num_keys of at least 7, the packed tokens, got 6"),
    ({"window": 0}, "at least 1"),
])
def test_bad_input(change: dict[str, object], message: str) -> None:
    x = torch.zeros(7, 2, 8)
    arguments = {"query": x, "key": x, "value": x, "cu_seqlens": torch.tensor([0, 3, 5, 7]),
                 "prefixes": torch.tensor([-1, 0, 0]), "max_seqlen": 5, "num_keys": 13,
                 "scale": 1.0, "window": None} | change
    with pytest.raises(ShapeError, match=message):
        prefix_attention(**arguments)


@pytest.mark.parametrize(("prefixes", "max_seqlen", "num_keys", "message"), [
    ([-1, 0, 1], 5, 13, r"prefixes\[2\] to be -1 or 0, .* got 1"),
    ([0, 0, 0], 5, 13, r"prefixes\[0\] to be -1 or -1, .* got 0"),
    ([-1, -1, 0], 5, 13, r"prefixes\[2\] to be -1 or 1, .* got 0"),
    ([-1, 0, 0], 4, 13, "max_seqlen of at least 5 and num_keys 13, .* got 4 and 13"),
    ([-1, 0, 0], 5, 12, "max_seqlen of at least 5 and num_keys 13, .* got 5 and 12"),
])
def test_prefixes_that_do_not_fit_are_found_on_request(
    prefixes: list[int], max_seqlen: int, num_keys: int, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")
    x = torch.zeros(7, 2, 8)
    with pytest.raises(ShapeError, match=message):
        prefix_attention(x, x, x, torch.tensor([0, 3, 5, 7]), torch.tensor(prefixes),
                         max_seqlen=max_seqlen, num_keys=num_keys, scale=1.0)
