"""paged_attention against its per-sequence reference and against packed_attention."""

import importlib
import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastrl_kernels.flash import paged_attention as flash
from torch import Tensor

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops.packed_attention import packed_attention
from fastrl.ops.paged_attention import (
    SharedPrefixes,
    _limits,
    paged_attention,
    paged_attention_reference,
)
from fastrl.paged_plan import PagedPlan

PAGE_SIZE = 4


def _inputs(
    lengths_q: list[int], kv_lens: list[int], heads: tuple[int, int] = (4, 2),
    dtype: torch.dtype = torch.float64, channels: int = 8,
) -> dict[str, Any]:
    """Pages in random order; unwritten slots hold NaN, unused table entries hold nonsense."""
    generator = torch.Generator().manual_seed(3)
    needed = [-(-n // PAGE_SIZE) for n in kv_lens]
    order = torch.randperm(sum(needed) + 2, generator=generator)
    table = torch.full((len(kv_lens), max(needed) + 1), -7)
    pages = torch.full((sum(needed) + 2, 2, 2, PAGE_SIZE, heads[1], channels),
                       torch.nan, dtype=dtype)
    first = 0
    for row, (count, length) in enumerate(zip(needed, kv_lens, strict=True)):
        table[row, :count] = order[first : first + count]
        for token in range(length):
            pages[table[row, token // PAGE_SIZE], :, :, token % PAGE_SIZE] = torch.randn(
                2, 2, heads[1], channels, generator=generator, dtype=dtype)
        first += count
    return {
        "query": torch.randn(sum(lengths_q), heads[0], channels, generator=generator, dtype=dtype),
        "kv_pages": pages, "layer": 1, "page_table": table, "kv_lens": torch.tensor(kv_lens),
        "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0),
        "max_seqlen_q": max(lengths_q), "max_kv_len": max(kv_lens), "scale": 0.4,
    }


CASES = [
    ([1, 1, 1, 1], [1, 4, 5, 40]),  # decode: one token, full page, one more, many pages
    ([1, 1, 1], [3, 0, 9]),  # an empty row in a decode batch
    ([3, 8, 3], [3, 8, 3]),  # prompts alone
    ([3, 2, 5, 1], [3, 9, 30, 1]),  # prompts and continuations together
    ([2, 0, 1], [7, 5, 1]),  # a sequence without a query
]


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("lengths_q", "kv_lens"), CASES, ids=str)
def test_equals_reference(
    lengths_q: list[int], kv_lens: list[int], heads: tuple[int, int], window: int | None
) -> None:
    inputs = _inputs(lengths_q, kv_lens, heads)
    out = paged_attention(**inputs, window=window)
    expected = paged_attention_reference(**inputs, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for row, kv_len in enumerate(kv_lens):
        begin, end = inputs["cu_seqlens_q"][row : row + 2]
        assert kv_len or not out[begin:end].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_that_of_the_reference_in_the_same_dtype(dtype: torch.dtype) -> None:
    inputs = _inputs([1, 1, 7], [50, 9, 7], dtype=dtype)
    wide = inputs | {"query": inputs["query"].double(), "kv_pages": inputs["kv_pages"].double()}
    truth = paged_attention_reference(**wide)
    out, plain = paged_attention(**inputs), paged_attention_reference(**inputs)
    assert out.dtype == dtype
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + torch.finfo(dtype).eps


def test_a_prompt_in_pages_equals_packed_attention() -> None:
    inputs = _inputs([9], [9])
    key, value = (inputs["kv_pages"][inputs["page_table"][0, :3], 1, side].flatten(0, 1)[:9]
                  for side in (0, 1))
    expected = packed_attention(inputs["query"], key, value, torch.tensor([0, 9]), max_seqlen=9,
                                scale=0.4)
    torch.testing.assert_close(paged_attention(**inputs), expected)


def _single(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The same pages with one sequence alone in the batch."""
    begin, end = inputs["cu_seqlens_q"][row : row + 2].tolist()
    kv_lens = inputs["kv_lens"][row : row + 1]
    width = -(-int(kv_lens) // PAGE_SIZE)  # a narrower table too
    return inputs | {
        "query": inputs["query"][begin:end], "page_table": inputs["page_table"][row:, :width][:1],
        "kv_lens": kv_lens, "cu_seqlens_q": torch.tensor([0, end - begin]),
        "max_seqlen_q": end - begin, "max_kv_len": int(kv_lens),
    }


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (1, 1)])
@pytest.mark.parametrize("lengths_q", [[1] * 9, [5, 9, 3, 17, 5, 12, 33, 2, 9]], ids=str)
def test_bits_of_a_sequence_do_not_depend_on_the_batch(
    lengths_q: list[int], heads: tuple[int, int], channels: int
) -> None:
    kv_lens = [5, 9, 3, 17, 5, 12, 33, 2, 9]
    inputs = _inputs(lengths_q, kv_lens, heads, torch.float32, channels)
    out: Tensor = paged_attention(**inputs)
    for row in range(len(kv_lens)):
        begin, end = inputs["cu_seqlens_q"][row : row + 2]
        assert torch.equal(out[begin:end], paged_attention(**_single(inputs, row)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4)}, "expected query"),
        ({"kv_pages": torch.zeros(2, 2, 4, 2, 8)}, "expected query"),
        ({"query": torch.zeros(2, 3, 8, dtype=torch.float64)}, "multiples of 2"),
        ({"query": torch.zeros(2, 4, 8)}, "dtype of the pages"),
        ({"page_table": torch.zeros(1, 4, dtype=torch.int64)}, "page_table"),
        ({"cu_seqlens_q": torch.tensor([0, 1])}, "page_table"),
        ({"max_kv_len": 100}, "more columns"),
        ({"window": 0}, "at least 1"),
        ({"layer": 2}, "layer from 0 to"),
        ({"layer": -1}, "layer from 0 to"),
        ({"kv_lens": torch.tensor([5, 3], dtype=torch.int32)}, "kv_lens int64 on cpu"),
        ({"page_table": torch.zeros(2, 4, dtype=torch.int64, device="meta")}, "page_table int64"),
        ({"kv_pages": torch.zeros(6, 2, 2, 4, 0, 8)}, "at least one slot, head"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        paged_attention(**(_inputs([1, 1], [5, 3]) | change))


def test_backends_that_cannot_run_are_refused_with_the_reason() -> None:
    with pytest.raises(BackendUnavailableError, match="'triton' cannot run here: the tensors are "
                                                      "on cpu"):
        paged_attention(**_inputs([1], [1]), backend="triton")
    with pytest.raises(BackendUnavailableError, match="'flash' cannot run here"):
        paged_attention(**_inputs([1], [1]), backend="flash")
    assert _limits(torch.empty(1, 1, 2, 512, 1, 256)) == ()
    assert [backend for backend, _ in _limits(torch.empty(1, 1, 2, 256, 1, 257))] == [
        "flash", "triton"]
    assert _limits(torch.empty(1, 1, 2, 16, 1, 8)) == (
        ("flash", "its pages hold a multiple of 256 tokens, these hold 16"),)


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (1, (0, 0)), (7, (6, 0))])
def test_arguments_of_flash_attn(window: int | None, expected: tuple[int, int]) -> None:
    inputs = _inputs([1, 2, 1], [5, 9, 3], dtype=torch.float16)
    tables: dict[str, Tensor] = {}
    given = flash.varlen_arguments(*inputs.values(), window, tables)
    assert {k: v for k, v in given.items() if not isinstance(v, Tensor)} == {
        "max_seqlen_q": 2, "max_seqlen_k": 9, "softmax_scale": 0.4, "causal": True,
        "window_size": expected}
    for side, name in enumerate("kv"):
        assert torch.equal(given[name].nan_to_num(), inputs["kv_pages"][:, 1, side].nan_to_num())
    assert given["q"] is inputs["query"]
    assert given["cu_seqlens_q"].tolist() == [0, 1, 3, 4]
    assert given["cu_seqlens_k"].tolist() == [0, 5, 14, 17]
    assert torch.equal(given["block_table"].long(), inputs["page_table"])
    assert all(table.dtype == torch.int32 for table in tables.values())
    again = flash.varlen_arguments(*(inputs | {"layer": 0}).values(), window, tables)
    assert all(again[name] is table for name, table in tables.items())


# A decode step with and without several splits, prompts with a continuation, a window.
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("lengths_q", "kv_lens", "window"), [
    ([1] * 4, [700, 0, 1300, 9], None), ([1] * 4, [30, 9, 400, 1], 100),
    ([600, 40, 1], [600, 900, 77], None), ([600, 40, 1], [600, 900, 77], 50)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "flash", "triton"])
def test_every_backend_on_a_gpu(
    backend: str, lengths_q: list[int], kv_lens: list[int], window: int | None, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("package flash_attn is not installed")
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash_attn takes no float32")
    num_pages = -(-max(kv_lens) // 256)
    table = torch.randperm(len(kv_lens) * num_pages).view(len(kv_lens), num_pages)
    inputs = {
        "query": torch.randn(sum(lengths_q), 8, 128), "page_table": table,
        "kv_pages": torch.randn(table.numel(), 2, 2, 256, 2, 128),
        "kv_lens": torch.tensor(kv_lens), "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0)}
    inputs = {k: v.to("cuda", dtype if v.is_floating_point() else None) for k, v in inputs.items()}
    options = {"layer": 1, "max_seqlen_q": max(lengths_q), "max_kv_len": max(kv_lens),
               "scale": 128**-0.5, "window": window}
    wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    truth = paged_attention_reference(**wide, **options)
    plain = paged_attention_reference(**inputs, **options)
    out = paged_attention(**inputs, **options, backend=backend)
    floor = torch.finfo(dtype).eps if dtype != torch.float32 else 4e-6
    assert out.dtype == dtype
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def test_a_plan_serves_every_layer_and_window() -> None:
    inputs = _inputs([3, 1, 6], [3, 9, 6])
    plan = PagedPlan()
    for layer in (0, 1):
        for window in (None, 2, 4):
            arguments = inputs | {"layer": layer, "window": window}
            assert torch.equal(paged_attention(**arguments, plan=plan),
                               paged_attention(**arguments))
    assert plan.groups is not None and len(plan.groups) == 3


def _one_page_each(kv_lens: list[int], pages: list[int], channels: int = 8) -> dict[str, Any]:
    """A decode step with one page of 67 slots for each sequence, all of them finite."""
    generator = torch.Generator().manual_seed(7)
    kv_pages = torch.randn(max(pages) + 1, 2, 2, 67, 2, channels, generator=generator)
    return {
        "query": torch.randn(len(kv_lens), 4, channels, generator=generator),
        "kv_pages": kv_pages, "layer": 1, "page_table": torch.tensor(pages)[:, None],
        "kv_lens": torch.tensor(kv_lens), "cu_seqlens_q": torch.arange(len(kv_lens) + 1),
        "max_seqlen_q": 1, "max_kv_len": max(kv_lens), "scale": 0.4,
    }


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("channels", [8, 5])
def test_reading_in_place_gives_the_bits_of_a_copy(channels: int, window: int | None) -> None:
    # Pages in several runs, backwards, with steps of 1, 2 and 3, and one that two rows share.
    inputs = _one_page_each([60, 5, 9, 33, 12, 64, 1, 40, 16, 0, 7],
                            [9, 0, 1, 2, 4, 6, 8, 11, 14, 3, 0], channels)
    plan = PagedPlan(slots_are_finite=True)
    out = paged_attention(**inputs, window=window, plan=plan)
    assert torch.equal(out, paged_attention(**inputs, window=window))
    torch.testing.assert_close(out, paged_attention_reference(**inputs, window=window))
    assert plan.groups is not None
    assert all((group.in_place is None) == (channels == 5) for group in plan.groups)


@pytest.mark.parametrize(("pages", "is_one_group"), [([0, 2, 4], True), ([4, 2, 0], False)])
def test_one_group_of_all_rows_needs_them_in_order(pages: list[int], is_one_group: bool) -> None:
    inputs, plan = _one_page_each([40, 33, 38], pages), PagedPlan(slots_are_finite=True)
    out = paged_attention(**inputs, plan=plan)
    assert plan.groups is not None and len(plan.groups) == 1
    assert plan.is_one_group == is_one_group
    torch.testing.assert_close(out, paged_attention_reference(**inputs))


def test_prompts_are_read_in_place() -> None:
    inputs = _one_page_each([9, 9, 40], [3, 1, 2])
    inputs |= {"query": torch.randn(58, 4, 8), "cu_seqlens_q": torch.tensor([0, 9, 18, 58]),
               "max_seqlen_q": 40}
    plan = PagedPlan(slots_are_finite=True)
    assert torch.equal(paged_attention(**inputs, plan=plan), paged_attention(**inputs))
    assert plan.groups is not None
    assert [group.in_place for group in plan.groups] == [slice(1, 4, 2), slice(2, 3, 1)]


def _shared() -> dict[str, Any]:
    """Three sequences with 8 tokens in common, one alone, two with 4, of which one is dead."""
    inputs = _inputs([1] * 6, [13, 9, 20, 7, 6, 5])
    table = inputs["page_table"]
    table[1:3, :2] = table[0, :2]
    table[5, :1] = table[4, :1]
    inputs["kv_lens"][5] = 0
    return inputs | {"prefixes": SharedPrefixes(
        torch.tensor([[0, 3], [4, 2], [0, 0]]), torch.tensor([8, 8, 8, 0, 4, 4]))}


@pytest.mark.parametrize("window", [None, 3, 7])
def test_sequences_that_share_pages(window: int | None) -> None:
    inputs = _shared()
    out = paged_attention(**inputs, window=window)
    assert torch.equal(out, paged_attention(**inputs | {"prefixes": None}, window=window))
    expected = paged_attention_reference(**inputs | {"prefixes": None}, window=window)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    # The reference takes what is shared from the first sequence of a group.
    inputs["page_table"][1:3, :2] = inputs["page_table"][5, :1] = -9
    assert torch.equal(paged_attention_reference(**inputs, window=window), expected)


@pytest.mark.parametrize(("change", "message"), [
    ({"groups": torch.tensor([[0, 3]], dtype=torch.int32)},
     "expected prefixes.groups int64 on cpu, got torch.int32"),
    ({"shared_lens": torch.zeros(6)}, "expected prefixes.shared_lens int64 on cpu, got torch.fl"),
    ({"groups": torch.tensor([0, 3])}, r"groups \[G, 2\] and shared_lens \[6\], got \[2\]"),
    ({"shared_lens": torch.zeros(5, dtype=torch.int64)}, r"got \[3, 2\] and \[5\]"),
])
def test_malformed_prefixes(change: dict[str, Tensor], message: str) -> None:
    inputs = _shared()
    inputs["prefixes"] = replace(inputs["prefixes"], **change)
    with pytest.raises(ShapeError, match=message):
        paged_attention(**inputs)


def test_prompts_have_no_prefixes() -> None:
    inputs = _inputs([2, 1], [8, 9]) | {"prefixes": SharedPrefixes(
        torch.tensor([[0, 2]]), torch.tensor([4, 4]))}
    with pytest.raises(ShapeError, match="steps of one token per sequence, got max_seqlen_q 2"):
        paged_attention(**inputs)


@pytest.mark.parametrize(("groups", "shared_lens", "message"), [
    ([[0, 3], [4, 3]], [8, 8, 8, 0, 4, 4], "groups of sequences 0 to 5 without one in two of them"),
    ([[0, 3], [2, 2]], [8, 8, 8, 0, 0, 0], "without one in two of them, got 2 and 2 more"),
    ([[0, 4], [4, 2]], [8, 8, 8, 8, 4, 4], "expected sequences 0 to 3 to share their first 8"),
    ([[0, 3], [4, 2]], [6, 6, 6, 0, 4, 4], "share their first 6 tokens in whole pages of 4"),
    ([[0, 3], [4, 2]], [8, 8, 8, 0, 4, 0], "expected shared_lens of the groups"),
    ([[0, 2], [4, 2]], [8, 8, 8, 0, 4, 4], "expected shared_lens of the groups"),
])
def test_false_prefixes_are_found_where_values_are_checked(
    groups: list[list[int]], shared_lens: list[int], message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = _shared()
    inputs["prefixes"] = SharedPrefixes(torch.tensor(groups), torch.tensor(shared_lens))
    paged_attention(**inputs)
    monkeypatch.setenv("FASTRL_CHECK", "1")
    with pytest.raises(ShapeError, match=message):
        paged_attention(**inputs)
    paged_attention(**_shared())


def test_a_group_whose_sequence_ends_in_the_shared_pages_is_found(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")
    inputs = _shared()
    inputs["kv_lens"][1] = 8
    with pytest.raises(ShapeError, match="and to have more tokens or none, got lengths"):
        paged_attention(**inputs)


def test_layers_after_the_first_check_and_choose_nothing_unless_values_are_looked_at(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    module, chosen = importlib.import_module("fastrl.ops.paged_attention"), []
    choose = module.choose
    monkeypatch.setattr(module, "choose", lambda *args: chosen.append(args) or choose(*args))
    inputs = _one_page_each([9, 40, 33], [0, 1, 2])
    with torch.no_grad():
        for check, count in (("0", 1), ("1", 3)):
            monkeypatch.setenv("FASTRL_CHECK", check)
            plan = PagedPlan(slots_are_finite=True)
            chosen.clear()
            outs = [paged_attention(**inputs | {"layer": layer}, plan=plan) for layer in (0, 1, 0)]
            assert len(chosen) == count
            assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
            torch.testing.assert_close(
                outs[1], paged_attention_reference(**inputs | {"layer": 1}))
