"""paged_attention where sequences share their first pages: the bits of each alone, read once."""

from functools import partial
from typing import Any

import pytest
import torch
from fastrl_kernels.triton import packed_attention as packed
from torch import Tensor

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, prefixes
from fastrl.models import DecoderConfig, attention, new_decoder
from fastrl.ops import paged_attention
from fastrl.ops.paged_attention import SharedPrefixes, paged_attention_reference

PAGE_SIZE, LAYERS = 16, 2
FLOORS = {torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
BLOCK_N = {torch.float32: 16, torch.float16: 64, torch.bfloat16: 64}
Group = tuple[int, list[int]]
"""(shared tokens, tokens of its own of each sequence)."""
DEAD = -1


def decode(
    groups: list[Group], heads: tuple[int, int] = (4, 2), C: int = 8,
    dtype: torch.dtype = torch.float16, page_size: int = PAGE_SIZE,
) -> dict[str, Any]:
    """A step over groups beside each other; those that share nothing are in none."""
    tables: list[list[int]] = []
    kv_lens, shared_lens, ranges = [], [], []
    num_pages = 1
    for shared, own_lens in groups:
        common = list(range(num_pages, num_pages + shared // page_size))
        num_pages += len(common)
        if shared:
            ranges.append((len(tables), len(own_lens)))
        for own in own_lens:
            count = -(-max(own, 0) // page_size)
            tables.append(common + list(range(num_pages, num_pages + count)))
            num_pages += count
            kv_lens.append(0 if own == DEAD else shared + own)
            shared_lens.append(shared)
    order = torch.randperm(num_pages)
    width = max(map(len, tables)) + 1
    table = torch.full((len(tables), width), 2**40)
    for row, own_pages in enumerate(tables):
        table[row, : len(own_pages)] = order[own_pages]
    spare = [(0, 0)] * (len(tables) // 2 - len(ranges) + 1)
    return {
        "query": torch.randn(len(tables), heads[0], C).to(dtype),
        "kv_pages": torch.randn(num_pages, LAYERS, 2, page_size, heads[1], C).to(dtype),
        "layer": 1, "page_table": table, "kv_lens": torch.tensor(kv_lens),
        "cu_seqlens_q": torch.arange(len(tables) + 1), "max_seqlen_q": 1,
        "max_kv_len": max(kv_lens), "scale": 0.4,
        "prefixes": SharedPrefixes(torch.tensor(ranges + spare), torch.tensor(shared_lens))}


def ours(inputs: dict[str, Any], **options: Any) -> Tensor:
    return paged_attention(**{**inputs, **options}, backend="triton")


def assert_bits_of_each_alone(inputs: dict[str, Any], **options: Any) -> Tensor:
    out = ours(inputs, **options)
    assert not out.isnan().any()
    assert torch.equal(out, ours(inputs, **options, prefixes=None))
    return out


def assert_as_good_as_torch(inputs: dict[str, Any], **options: Any) -> None:
    inputs = inputs | options
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
            for k, v in inputs.items()}
    truth, plain = paged_attention_reference(**wide), paged_attention_reference(**inputs)
    error, torch_error = ((x - truth).abs().max() for x in (ours(inputs), plain))
    assert error <= 2 * torch_error + FLOORS[plain.dtype] * (1 + truth.abs().max())


S = packed.SPLIT
# One split: of several blocks, of one, less than one; ragged, alone, with dead ones, none alive.
SHORT: list[Group] = [(192, [1, 70, 3]), (64, [5, 90]), (48, [9, 9]), (0, [7]), (128, [30]),
                      (80, [DEAD, 20, DEAD, 4]), (64, [DEAD, DEAD]), (0, [DEAD, 200])]
# Shared to the end of a split, beyond it, below it; two splits; beside one that shares nothing.
LONG: list[Group] = [(S, [1, 40]), (S + 80, [3, 500, DEAD]), (S - 64, [70, 2]),
                     (2 * S, [9, 1]), (0, [30])]


@pytest.mark.parametrize("dtype, window", [
    (torch.float16, None), (torch.float16, 150), (torch.float32, 50), (torch.bfloat16, None)],
    ids=str)
def test_groups_in_one_split(dtype: torch.dtype, window: int | None) -> None:
    inputs = decode(SHORT, dtype=dtype)
    out = assert_bits_of_each_alone(inputs, window=window)
    assert_as_good_as_torch(inputs, window=window)
    assert not out[inputs["kv_lens"] == 0].any()


# Of 600 keys a window ends in the shared pages of some and of none of others.
@pytest.mark.parametrize("window", [None, 60, 600])
def test_groups_in_several_splits(window: int | None) -> None:
    inputs = decode(LONG, (2, 1))
    out = assert_bits_of_each_alone(inputs, window=window)
    assert_as_good_as_torch(inputs, window=window)
    assert not out[inputs["kv_lens"] == 0].any()


# Alike, in pairs, not a power of two, more than a tile of float32 or of 64 rows has.
@pytest.mark.parametrize("heads, dtype", [
    ((2, 2), torch.float16), ((6, 2), torch.float16), ((20, 1), torch.float32),
    ((70, 1), torch.float16)], ids=str)
def test_grouped_heads(heads: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = decode([(80, [3, 40, 1]), (64, [7, 7])], heads, dtype=dtype)
    assert_bits_of_each_alone(inputs)
    assert_as_good_as_torch(inputs)


def test_a_group_of_more_than_a_tile() -> None:
    inputs = decode([(64, list(range(1, 20)))], (4, 1))  # 19 sequences in tiles of 16
    assert_bits_of_each_alone(inputs)
    assert_bits_of_each_alone(inputs, window=66)


@pytest.mark.parametrize("C", [1, 20, 80])
def test_channels(C: int) -> None:
    assert_bits_of_each_alone(decode([(80, [3, 40])], (2, 1), C))


@pytest.mark.parametrize("page_size", [1, 24, 128])
def test_page_sizes(page_size: int) -> None:
    shared = -(-100 // page_size) * page_size
    assert_bits_of_each_alone(decode([(shared, [3, 40])], (2, 1), page_size=page_size))


@pytest.mark.parametrize("groups", [SHORT, LONG], ids=["one split", "several"])
def test_whole_blocks_are_read_by_the_pages_of_the_first_alone(groups: list[Group]) -> None:
    inputs = decode(groups, (2, 1))
    expected = ours(inputs)
    table, block = inputs["page_table"].clone(), BLOCK_N[torch.float16]
    for first, count in inputs["prefixes"].groups.tolist():
        whole = int(inputs["prefixes"].shared_lens[first]) // block * block if count else 0
        table[first + 1 : first + count, : whole // PAGE_SIZE] = 2**40
    assert not torch.equal(table, inputs["page_table"])
    assert torch.equal(ours(inputs, page_table=table), expected)


def test_what_nobody_sees_is_not_read() -> None:
    inputs = decode([(128, [DEAD, 9, 30]), (64, [DEAD, DEAD])], (2, 1))
    expected = ours(inputs, window=40)
    inputs["page_table"][:3, : 64 // PAGE_SIZE] = 2**40  # before the windows of those alive
    inputs["page_table"][3:] = 2**40
    assert torch.equal(ours(inputs, window=40), expected)


def test_a_loose_bound_on_lengths_and_strides() -> None:
    """As in a captured graph; and indices that lie apart."""
    inputs = decode([(80, [5, 9]), (0, [3])], (2, 1))
    expected = ours(inputs)
    wide = torch.nn.functional.pad(inputs["page_table"], (0, 100))
    assert torch.equal(ours(inputs, page_table=wide, max_kv_len=3 * S), expected)
    groups, shared_lens = inputs["prefixes"].groups, inputs["prefixes"].shared_lens
    apart = SharedPrefixes(torch.stack([groups, -groups], dim=-1)[..., 0],
                           torch.stack([shared_lens, -shared_lens], dim=-1)[..., 0])
    assert torch.equal(ours(inputs, prefixes=apart), expected)


def test_launches(launches: list[str]) -> None:
    ours(decode(SHORT))
    ours(decode(LONG[:1], (2, 1)))
    first, then, merge = (f"_paged_attention_{kind}_kernel" for kind in ("prefix", "fwd", "merge"))
    assert launches == [first, then, first, then, merge]


def test_a_sequence_without_a_query() -> None:
    inputs = decode([(64, [5, 9, 20])], (2, 1))
    whole = ours(inputs)
    less = ours(inputs, query=inputs["query"][[0, 2]], cu_seqlens_q=torch.tensor([0, 1, 1, 2]))
    assert torch.equal(less, whole[[0, 2]])


def test_registered_op() -> None:
    inputs = decode([(64, [5, 9])], (2, 1))
    inputs["page_table"] = inputs["page_table"][:, :-1]
    prefixes = inputs.pop("prefixes")
    torch.library.opcheck(torch.ops.fastrl_kernels.paged_attention,
                          (*inputs.values(), 4, prefixes.groups, prefixes.shared_lens))


def test_compiles_to_one_graph() -> None:
    inputs = decode([(64, [5, 9])], (2, 1))
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(**inputs, backend="triton"), ours(inputs))


def test_an_engine_draws_the_same_bits_with_groups(
    monkeypatch: pytest.MonkeyPatch, launches: list[str]
) -> None:
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_layers": 1,
             "num_heads": 2, "num_kv_heads": 1, "head_dim": 4, "max_positions": 64}
    model = new_decoder(DecoderConfig(family="llama", **sizes, initializer_range=0.3), 0)
    model.to(torch.get_default_device())
    monkeypatch.setattr(attention, "paged_attention", partial(paged_attention, backend="triton"))
    engine = Engine(model, EngineConfig(page_size=8))
    kernels, rollouts = [], []
    for least in (0, 2**60):
        monkeypatch.setattr(prefixes, "MIN_TOKENS", 1)
        monkeypatch.setattr(prefixes, "MIN_SAVED_BYTES", least)
        launches.clear()
        rollouts.append(engine.generate(
            [list(range(2, 28))], SamplingConfig(max_new_tokens=4, stop_token_ids=()),
            num_samples_per_prompt=2))
        kernels.append(set(launches))
    assert kernels[0] - kernels[1] == {"_paged_attention_prefix_kernel"}
    for name in ("token_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(*(getattr(rollout, name) for rollout in rollouts)), name
