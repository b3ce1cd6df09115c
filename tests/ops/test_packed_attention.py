"""packed_attention against its per-sequence reference, forward and gradients."""

import pytest
import torch
from torch import Tensor

from fastrl.errors import ShapeError
from fastrl.ops.packed_attention import (
    packed_attention,
    packed_attention_reference,
    similar_lengths,
)

# Equal lengths, mixed lengths, a single token, one sequence alone, many groups.
LENGTHS = [[4, 4, 4], [7, 1, 3, 7, 64, 2], [1], [33], [1, 2, 4, 8, 16, 32]]


def _inputs(
    lengths: list[int], num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    total = sum(lengths)
    query, key, value = (
        torch.randn(total, heads, 8, generator=generator, dtype=dtype).requires_grad_()
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return query, key, value, torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_equals_reference_with_gradients(
    lengths: list[int], heads: tuple[int, int], window: int | None
) -> None:
    *inputs, cu_seqlens = _inputs(lengths, *heads, torch.float64)
    kwargs = {"max_seqlen": max(lengths), "scale": 0.3, "window": window}
    out = packed_attention(*inputs, cu_seqlens, **kwargs)
    expected = packed_attention_reference(*inputs, cu_seqlens, **kwargs)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    for grad, truth in zip(torch.autograd.grad((out * weight).sum(), inputs),
                           torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_within_twice_that_of_the_reference_in_the_same_dtype(dtype: torch.dtype) -> None:
    *inputs, cu_seqlens = _inputs([9, 40, 3], 4, 2, dtype)
    kwargs = {"max_seqlen": 40, "scale": 0.35}
    truth = packed_attention_reference(*(x.double() for x in inputs), cu_seqlens, **kwargs)
    out = packed_attention(*inputs, cu_seqlens, **kwargs)
    plain = packed_attention_reference(*inputs, cu_seqlens, **kwargs)
    assert out.dtype == dtype
    floor = torch.finfo(dtype).eps
    assert (out - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor


def test_golden_values() -> None:
    # One head, one channel, keys 0: every visible key has the same weight, so outputs are means.
    query = torch.ones(5, 1, 1, dtype=torch.float64)
    value = torch.tensor([1.0, 3.0, 5.0, 10.0, 20.0], dtype=torch.float64).view(5, 1, 1)
    cu_seqlens = torch.tensor([0, 3, 5])
    out = packed_attention(query, 0 * query, value, cu_seqlens, max_seqlen=3, scale=1.0)
    assert out.flatten().tolist() == pytest.approx([1, 2, 3, 10, 15])
    out = packed_attention(query, 0 * query, value, cu_seqlens, max_seqlen=3, scale=1.0, window=2)
    assert out.flatten().tolist() == pytest.approx([1, 2, 4, 10, 15])


def test_a_sequence_does_not_see_its_neighbours() -> None:
    query, key, value, cu_seqlens = _inputs([5, 9, 6], 2, 2, torch.float64)
    out = packed_attention(query, key, value, cu_seqlens, max_seqlen=9, scale=1.0)
    grads = torch.autograd.grad(out[5:14].sum(), [query, key, value])
    for grad in grads:
        assert grad[:5].abs().max() == 0 and grad[14:].abs().max() == 0


def test_non_contiguous_inputs() -> None:
    query, key, value, cu_seqlens = _inputs([5, 9], 2, 2, torch.float64)
    merged = torch.cat([query, key, value], dim=1)
    out = packed_attention(*merged.split(2, dim=1), cu_seqlens, max_seqlen=9, scale=1.0)
    expected = packed_attention(query, key, value, cu_seqlens, max_seqlen=9, scale=1.0)
    assert torch.equal(out, expected)


def test_groups_waste_at_most_a_quarter() -> None:
    lengths = torch.randint(1, 512, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = similar_lengths(lengths)
    assert sorted(i for group in groups for i in group) == list(range(300))
    for group in groups:
        members = [lengths[i] for i in group]
        assert max(members) * len(members) <= 1.25 * sum(members)
    assert len(groups) < 25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 2)}, "expected query"),
        ({"value": torch.zeros(4, 1, 8)}, "expected query"),
        ({"query": torch.zeros(5, 2, 8)}, "differ in tokens"),
        ({"query": torch.zeros(4, 3, 8)}, "not a multiple"),
        ({"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32)}, "cu_seqlens"),
        ({"window": 0}, "at least 1"),
        ({"max_seqlen": 0}, "at least 1"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    x = torch.zeros(4, 2, 8)
    arguments = {"query": x, "key": x, "value": x, "cu_seqlens": torch.tensor([0, 4]),
                 "max_seqlen": 4, "scale": 1.0, "window": None} | change
    with pytest.raises(ShapeError, match=message):
        packed_attention(**arguments)
