"""packed_attention against its per-sequence reference, and which path runs it where."""

import importlib.util
import inspect

import pytest
import torch
from fastrl_kernels.flash import packed_attention as flash
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from fastrl.errors import BackendUnavailableError, ConfigError, ShapeError
from fastrl.ops.packed_attention import (
    kernel_limits,
    packed_attention,
    packed_attention_reference,
    similar_lengths,
    torch_path,
    varlen_arguments,
)

# Equal lengths, mixed lengths, a single token, one sequence alone, many groups, empty ones.
LENGTHS = [[4, 4, 4], [7, 1, 3, 7, 64, 2], [1], [33], [1, 2, 4, 8, 16, 32], [0, 5, 0, 9, 0]]


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


def test_no_tokens_at_all() -> None:
    x = torch.zeros(0, 2, 8)
    assert packed_attention(x, x, x, torch.zeros(3, dtype=torch.int64), max_seqlen=4,
                            scale=1.0).shape == (0, 2, 8)


def test_equal_lengths_are_known_without_reading_them(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, cu_seqlens = _inputs([6, 6, 6], 2, 2, torch.float32)
    monkeypatch.setattr(Tensor, "tolist", lambda x: pytest.fail("a host read"))
    packed_attention(query, key, value, cu_seqlens, max_seqlen=6, scale=1.0)


def test_a_longest_sequence_that_is_too_short_is_found_on_request(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value, cu_seqlens = _inputs([3, 1], 2, 2, torch.float32)
    monkeypatch.setenv("FASTRL_CHECK", "1")
    with pytest.raises(ShapeError, match="max_seqlen of at least 3.*got 2"):
        packed_attention(query, key, value, cu_seqlens, max_seqlen=2, scale=1.0)


# The table of docs/kernels.md: device, type, channels, longest, window, equal lengths, capability.
@pytest.mark.parametrize(("shape", "path"), [
    (("cuda", torch.bfloat16, 128, 2048, None, True, 9), "cudnn"),
    (("cuda", torch.float16, 64, 8192, None, True, 9), "cudnn"),
    (("cuda", torch.bfloat16, 128, 2047, None, True, 9), "varlen"),
    (("cuda", torch.bfloat16, 128, 2048, None, False, 9), "varlen"),
    (("cuda", torch.bfloat16, 128, 2048, 512, True, 9), "varlen"),
    (("cuda", torch.bfloat16, 136, 2048, None, True, 9), "varlen"),
    (("cuda", torch.bfloat16, 128, 2048, None, True, 8), "varlen"),
    (("cuda", torch.bfloat16, 128, 2048, None, True, 10), "varlen"),
    (("cuda", torch.float16, 256, 64, 8, False, 8), "varlen"),
    (("cuda", torch.float16, 264, 64, None, False, 8), "dense"),
    (("cuda", torch.float16, 20, 64, None, False, 8), "dense"),
    (("cuda", torch.float16, 64, 64, None, False, 7), "dense"),
    (("cuda", torch.float32, 64, 4096, None, True, 9), "dense"),
    (("cpu", torch.bfloat16, 128, 4096, None, True, 0), "dense"),
])
def test_the_path_of_every_shape(shape: tuple, path: str) -> None:
    assert torch_path(*shape) == path


def test_heads_that_no_kernel_takes() -> None:
    assert kernel_limits(256) == ()
    assert [backend for backend, _ in kernel_limits(257)] == ["flash", "triton"]


def test_flash_is_refused_with_the_reason() -> None:
    x, cu_seqlens = torch.zeros(4, 2, 8), torch.tensor([0, 4])
    missing = "package flash_attn is not installed. Install fastrl with the flash-attn extra"
    reason = "the tensors are on cpu" if importlib.util.find_spec("flash_attn") else missing
    with pytest.raises(BackendUnavailableError, match=f"'flash' cannot run here: {reason}"):
        packed_attention(x, x, x, cu_seqlens, max_seqlen=4, scale=1.0, backend="flash")
    assert flash.supports("cuda", torch.float32) == (
        "it takes float16 and bfloat16, the tensors are float32")
    assert flash.supports("cpu", torch.float16) == "the tensors are on cpu"
    assert flash.supports("cuda", torch.bfloat16) is None


@pytest.mark.parametrize(("window", "expected"), [(None, (-1, 0)), (1, (0, 0)), (7, (6, 0))])
def test_arguments_of_the_kernels_of_others(
    window: int | None, expected: tuple[int, int]
) -> None:
    query, key, value, cu_seqlens = _inputs([5, 9], 4, 2, torch.float16)
    call = (query, key, value, cu_seqlens, 9, 0.3, window)
    bound = inspect.signature(varlen_attn).bind(**varlen_arguments(*call)).arguments
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        assert bound[name] is tensor
    for name in ("cu_seq_q", "cu_seq_k"):
        assert bound[name].dtype == torch.int32 and bound[name].tolist() == [0, 5, 14]
    assert (bound["max_q"], bound["max_k"], bound["scale"]) == (9, 9, 0.3)
    assert bound["window_size"] == expected  # with (-1, 0) varlen_attn sets its causal flag
    assert bound.get("enable_gqa", True) is True

    ours = flash.varlen_arguments(*call)
    assert {k: v for k, v in ours.items() if not isinstance(v, Tensor)} == {
        "max_seqlen_q": 9, "max_seqlen_k": 9, "softmax_scale": 0.3, "causal": True,
        "window_size": expected, "deterministic": False}
    assert ours["q"] is query and ours["k"] is key and ours["v"] is value
    assert ours["cu_seqlens_q"].dtype == ours["cu_seqlens_k"].dtype == torch.int32


def _on_a_gpu(backend: str, C: int, dtype: torch.dtype) -> None:
    """Skip, with the reason, where this backend cannot run."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("package flash_attn is not installed")
    if backend == "flash" and dtype == torch.float32:
        pytest.skip("flash_attn takes no float32")


# cuDNN (on Hopper), varlen, dense because of the channels; a window; empty sequences.
GPU_SHAPES = [([2048, 2048], 64, None), ([700, 0, 129, 1], 128, None), ([300, 64], 64, 33),
              ([90, 17], 20, None), ([90, 17], 256, 40)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("lengths", "C", "window"), GPU_SHAPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "flash", "triton", "auto"])
def test_every_path_on_a_gpu(
    backend: str, lengths: list[int], C: int, window: int | None, dtype: torch.dtype
) -> None:
    _on_a_gpu(backend, C, dtype)
    total = sum(lengths)
    qkv = torch.randn(total, 8, C, device="cuda").to(dtype)  # 4 query heads, 2 of k and 2 of v
    weight = torch.randn(total, 4, C, device="cuda").to(dtype)
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    kwargs = {"max_seqlen": max(lengths), "scale": C**-0.5, "window": window}

    def run(function, type_: torch.dtype, **options) -> list[Tensor]:
        leaf = qkv.to(type_).detach().requires_grad_()
        out = function(*leaf.split([4, 2, 2], dim=1), cu_seqlens, **kwargs, **options)
        return [out, *torch.autograd.grad((out * weight.to(type_)).sum(), leaf)]

    truth = run(packed_attention_reference, torch.float64)
    plain = run(packed_attention_reference, dtype)
    ours = run(packed_attention, dtype, backend=backend)
    for wide, torch_result, result in zip(truth, plain, ours, strict=True):
        assert result.dtype == dtype
        error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
        floor = max(torch.finfo(dtype).eps, 4e-6)  # gradients that cancel leave their rounding
        assert error <= 2 * torch_error + floor * (1 + wide.abs().max())


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
        ({"query": torch.zeros(4, 2, 8).bfloat16()}, "of one floating type"),
        ({"key": torch.zeros(4, 0, 8), "value": torch.zeros(4, 0, 8)}, "at least one head"),
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


def test_bad_scale() -> None:
    x = torch.zeros(4, 2, 8)
    with pytest.raises(ConfigError, match="scale above 0, got 0"):
        packed_attention(x, x, x, torch.tensor([0, 4]), max_seqlen=4, scale=0)
