"""paged_attention's Triton kernels against the float64 reference; run by test_triton.py."""

from typing import Any

import pytest
import torch
from fastrl_kernels.triton import packed_attention as packed
from torch import Tensor

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import BackendUnavailableError
from fastrl.models import DecoderConfig, attention, new_decoder
from fastrl.ops import packed_attention, paged_attention
from fastrl.ops.paged_attention import paged_attention_reference

FLOOR = 4e-6  # float32 sums in another order
# The interpreter cuts a float32 to half precision where a GPU rounds: one more unit.
FLOORS = {torch.float32: FLOOR, torch.float16: 2**-10, torch.bfloat16: 2**-7}
LAYERS = 2


def make(
    lengths_q: list[int], kv_lens: list[int], heads: tuple[int, int] = (2, 1), C: int = 8,
    page_size: int = 4, dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Pages in random order; unwritten slots hold NaN, unused table entries lie far outside."""
    needed = [-(-n // page_size) for n in kv_lens]
    order = torch.randperm(sum(needed) + 1)
    table = torch.full((len(kv_lens), max(needed) + 1), 2**40)
    pages = torch.full((sum(needed) + 1, LAYERS, 2, page_size, heads[1], C), torch.nan, dtype=dtype)
    first = 0
    for row, (count, length) in enumerate(zip(needed, kv_lens, strict=True)):
        own = order[first : first + count]
        table[row, :count] = own
        tokens = torch.full((count * page_size, LAYERS, 2, heads[1], C), torch.nan)
        tokens[:length] = torch.randn(length, LAYERS, 2, heads[1], C)
        pages[own] = tokens.to(dtype).unflatten(0, (count, page_size)).permute(0, 2, 3, 1, 4, 5)
        first += count
    return {"query": torch.randn(sum(lengths_q), heads[0], C).to(dtype), "kv_pages": pages,
            "layer": 1, "page_table": table, "kv_lens": torch.tensor(kv_lens),
            "cu_seqlens_q": torch.tensor([0, *lengths_q]).cumsum(0),
            "max_seqlen_q": max(lengths_q), "max_kv_len": max(kv_lens), "scale": 0.4}


def decode(kv_lens: list[int], *arguments: Any, **options: Any) -> dict[str, Any]:
    """One new token for each sequence."""
    return make([1] * len(kv_lens), kv_lens, *arguments, **options)


def ours(inputs: dict[str, Any], **options: Any) -> Tensor:
    return paged_attention(**{**inputs, **options}, backend="triton")


def assert_as_good_as_torch(inputs: dict[str, Any], **options: Any) -> None:
    inputs = inputs | options
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()}
    truth, plain = paged_attention_reference(**wide), paged_attention_reference(**inputs)
    out = ours(inputs)
    assert out.dtype == plain.dtype and out.shape == truth.shape and not out.isnan().any()
    error, torch_error = ((x - truth).abs().max() for x in (out, plain))
    assert error <= 2 * torch_error + FLOORS[out.dtype] * (1 + truth.abs().max())


# One token; below, at and above a page and a block of 16; nothing in the cache; no query.
LENGTHS = [
    ([1] * 7, [1, 4, 5, 15, 16, 17, 40]),
    ([1, 1, 0, 1], [3, 0, 9, 33]),
    ([3, 17, 1], [3, 17, 1]),
    ([3, 2, 20, 1, 0], [3, 9, 55, 1, 4]),
    ([5, 4, 3], [5, 0, 20]),
]


@pytest.mark.parametrize("lengths_q, kv_lens", LENGTHS, ids=str)
def test_lengths(lengths_q: list[int], kv_lens: list[int]) -> None:
    inputs = make(lengths_q, kv_lens)
    assert_as_good_as_torch(inputs)
    out = ours(inputs)
    for row, kv_len in enumerate(kv_lens):
        begin, end = inputs["cu_seqlens_q"][row : row + 2]
        assert kv_len or not out[begin:end].any()


# Alike, in pairs, not a power of two, more heads than a tile of float32 has rows.
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1), (20, 1)])
def test_grouped_heads(heads: tuple[int, int]) -> None:
    assert_as_good_as_torch(decode([21, 7], heads))
    # Of three heads a tile has a row to spare, whose token is the next: it sees a key too few.
    assert_as_good_as_torch(make([6, 9], [17, 21], heads))


# A page for each token, odd pages, pages longer than a block and than a sequence.
@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_sizes(page_size: int) -> None:
    assert_as_good_as_torch(decode([37, 5, 64], page_size=page_size))


@pytest.mark.parametrize("C", [1, 20, 80, 256])
def test_channels(C: int) -> None:
    assert_as_good_as_torch(decode([19, 2], C=C), scale=C**-0.5)
    assert_as_good_as_torch(make([5, 2], [19, 2], C=C), scale=C**-0.5)


# Itself alone; within a block; a block; beyond two; as long as the sequence.
@pytest.mark.parametrize("window", [1, 5, 16, 37, 52])
def test_window(window: int) -> None:
    assert_as_good_as_torch(decode([52, 5, 33, 0]), window=window)
    assert_as_good_as_torch(make([40, 5, 2], [52, 5, 33]), window=window)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50])
def test_half_precision(dtype: torch.dtype, window: int | None) -> None:
    assert_as_good_as_torch(decode([150, 3, 65], (4, 2), page_size=16, dtype=dtype), window=window)
    assert_as_good_as_torch(make([90, 3, 1], [150, 3, 65], (4, 2), page_size=16, dtype=dtype),
                            window=window)


# Below, at and above a split, and three; lengths of 0 and 1 beside them.
@pytest.mark.parametrize("window", [None, 600])
def test_splits(window: int | None) -> None:
    S = packed.SPLIT
    inputs = decode([S - 1, S, S + 1, 2 * S + 200, 0, 1], page_size=16, dtype=torch.float16)
    assert_as_good_as_torch(inputs, window=window)
    inputs = make([70, 2], [S + 40, 2 * S + 1], page_size=16, dtype=torch.float16)
    assert_as_good_as_torch(inputs, window=window)


def test_splits_are_merged_from_the_left() -> None:
    """The parts of a decode step as the running sums of a pass that walks along the keys."""
    length = 3 * packed.SPLIT + 70
    walk = make([2], [length], (4, 2), C=32, page_size=16)
    step = walk | {"query": walk["query"][1:], "cu_seqlens_q": torch.tensor([0, 1]),
                   "max_seqlen_q": 1}
    assert torch.equal(ours(step)[0], ours(walk)[1])


def test_large_scores_do_not_overflow() -> None:
    inputs = decode([packed.SPLIT + 40, 7], page_size=16, dtype=torch.float16)
    inputs["query"] *= 300
    assert_as_good_as_torch(inputs, scale=1.0)


@pytest.mark.parametrize("lengths_q", [[1, 1], [6, 3]], ids=str)
def test_strides(lengths_q: list[int]) -> None:
    inputs = make(lengths_q, [19, 5], (4, 2))
    expected = ours(inputs)
    merged = torch.cat([inputs["query"], torch.randn(sum(lengths_q), 3, 8)], dim=1)

    def apart(x: Tensor) -> Tensor:
        return torch.stack([x, torch.full_like(x, -1)], dim=-1)[..., 0]

    for change in (
        {"query": merged[:, :4]}, {"query": apart(inputs["query"])},
        {"kv_pages": apart(inputs["kv_pages"])},
        {"kv_pages": inputs["kv_pages"].transpose(3, 4).contiguous().transpose(3, 4)},
        {"page_table": apart(inputs["page_table"])},
        {"page_table": inputs["page_table"].t().contiguous().t()},
        {"kv_lens": apart(inputs["kv_lens"]), "cu_seqlens_q": apart(inputs["cu_seqlens_q"])},
    ):
        assert torch.equal(ours(inputs, **change), expected)


def of_sequence(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """The same pages with one sequence alone in the batch."""
    begin, end = inputs["cu_seqlens_q"][row : row + 2].tolist()
    kv_lens = inputs["kv_lens"][row : row + 1]
    return inputs | {
        "query": inputs["query"][begin:end], "page_table": inputs["page_table"][row : row + 1],
        "kv_lens": kv_lens, "cu_seqlens_q": torch.tensor([0, end - begin]),
        "max_seqlen_q": end - begin, "max_kv_len": int(kv_lens)}


@pytest.mark.parametrize("dtype, longest", [(torch.float32, 70), (torch.float16, packed.SPLIT + 9)])
@pytest.mark.parametrize("window", [None, 30])
def test_a_sequence_keeps_its_bits_in_every_batch(
    dtype: torch.dtype, longest: int, window: int | None
) -> None:
    # Alone, the shorter ones have one split and one launch; beside a long one they have several.
    kv_lens = [5, 40, 16, longest]
    for lengths_q in ([1] * 4, [5, 33, 1, 2]):
        inputs = make(lengths_q, kv_lens, page_size=16, dtype=dtype)
        together = ours(inputs, window=window)
        for row in range(4):
            begin, end = inputs["cu_seqlens_q"][row : row + 2]
            assert torch.equal(ours(of_sequence(inputs, row), window=window), together[begin:end])


@pytest.mark.parametrize("dtype, length, window", [
    (torch.float32, 40, None), (torch.float32, 40, 18), (torch.float16, 150, None),
    (torch.float16, 150, 50), (torch.float16, packed.SPLIT + 70, None),
    (torch.float16, packed.SPLIT + 70, packed.SPLIT + 20)])
def test_a_token_has_the_bits_of_packed_attention(
    dtype: torch.dtype, length: int, window: int | None
) -> None:
    """Packed, as a prompt in pages, as the end of a longer one, and token by token."""
    prompt = make([length], [length], (2, 1), page_size=16, dtype=dtype)
    order = prompt["page_table"][0, : -(-length // 16)]
    key, value = (prompt["kv_pages"][order, 1, side].flatten(0, 1)[:length] for side in (0, 1))
    expected = packed_attention(prompt["query"], key, value, torch.tensor([0, length]),
                                max_seqlen=length, scale=0.4, window=window, backend="triton")
    assert torch.equal(ours(prompt, window=window), expected)
    end = length - 20
    longer = prompt | {"query": prompt["query"][end:], "cu_seqlens_q": torch.tensor([0, 20]),
                       "max_seqlen_q": 20}
    assert torch.equal(ours(longer, window=window), expected[end:])
    steps = torch.tensor([1, 15, 16, 17, 33, length - 1, length])  # tokens cached at each
    tokens = prompt | {
        "query": prompt["query"][steps - 1], "kv_lens": steps,
        "page_table": prompt["page_table"].expand(len(steps), -1),
        "cu_seqlens_q": torch.arange(len(steps) + 1), "max_seqlen_q": 1}
    assert torch.equal(ours(tokens, window=window), expected[steps - 1])


def test_the_bound_on_lengths_may_be_loose() -> None:
    """As in a captured graph, whose grid is that of the longest sequence it can hold."""
    inputs = decode([40, 0, 7], page_size=16)
    inputs["page_table"] = torch.nn.functional.pad(inputs["page_table"], (0, 100))
    assert torch.equal(ours(inputs, max_kv_len=3 * packed.SPLIT), ours(inputs))


def test_an_engine_draws_the_tokens_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_layers": 2,
             "num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "max_positions": 64}
    model = new_decoder(DecoderConfig(family="llama", **sizes, initializer_range=0.3), 0)
    model.to(torch.get_default_device())
    prompts, sampling = [[3, 9, 4], [7], list(range(2, 22))], SamplingConfig(max_new_tokens=5)

    calls = []

    def rollout(backend: str) -> Any:
        def by_name(*arguments: Any, **options: Any) -> Tensor:
            calls.append(options["max_seqlen_q"])
            return paged_attention(*arguments, **options, backend=backend)

        monkeypatch.setattr(attention, "paged_attention", by_name)
        return Engine(model, EngineConfig(page_size=4)).generate(
            prompts, sampling, seed=1, num_samples_per_prompt=2)

    expected, got = rollout("torch"), rollout("triton")
    assert len(calls) > 16 and min(calls) == 1 < max(calls)
    assert torch.equal(got.token_ids, expected.token_ids)
    torch.testing.assert_close(got.rollout_logprobs, expected.rollout_logprobs)


def test_registered_op() -> None:
    inputs = make([20, 0, 3], [20, 4, 9])
    inputs["kv_pages"] = inputs["kv_pages"].nan_to_num()
    keywords = [inputs.pop(k) for k in ("max_seqlen_q", "max_kv_len", "scale")]
    torch.library.opcheck(torch.ops.fastrl_kernels.paged_attention,
                          (*inputs.values(), *keywords, 4, None, None))


def test_compiles_to_one_graph() -> None:
    inputs = decode([20, 0, 9])
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, backend="triton"), ours(inputs))


def test_refusals() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        ours(decode([3], dtype=torch.float64))
    with pytest.raises(BackendUnavailableError, match="at most 256 channels per head, these have "
                                                      "257"):
        ours(decode([3], C=257))
