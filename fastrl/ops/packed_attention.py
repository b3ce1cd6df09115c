"""packed_attention: causal attention within each sequence of a packed batch.

    out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= i, j > i - window, same sequence

Shape letters: N packed tokens, B sequences, Hq and Hk query and KV heads, C channels per head.

Which path "auto" takes, by shape; the first line that fits (figures: docs/kernels.md):

    equal lengths from 2048 tokens, C up to 128, no window, half precision, Hopper   torch: cuDNN
    flash_attn installed, half precision, GPU, C up to 256                           flash
    half precision, GPU from Ampere on, C up to 256 and a multiple of 8              torch: varlen
    anything else: CPU, float32, float64, odd or large heads                         torch: dense
"""

import inspect
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastrl.backends import choose
from fastrl.checks import check_device, check_offsets, check_positive, check_values
from fastrl.dense_attention import visible_keys, whole_units
from fastrl.environment import checks_values
from fastrl.errors import ShapeError

# Who installs flash_attn wants it; Triton comes after torch until a GPU has measured it.
PREFERENCE = ("flash", "torch", "triton")
CUDNN_FIRST = ("torch", "flash", "triton")
MAX_KERNEL_CHANNELS = 256
"""Of a head, in the kernels of flash_attn, of torch's varlen_attn and in ours."""
MAX_CUDNN_CHANNELS = 128
MIN_CUDNN_TOKENS = 2048
"""From here cuDNN is published as faster; at 1024 they are level (sgl-project/sglang#30090)."""
CUDNN_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION,
               SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
MAX_PADDING = 1.25
"""Padded tokens per real token in one call of the dense kernel."""


def packed_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None,
) -> Tensor:
    """packed_attention, one sequence at a time with a plain softmax."""
    outputs = []
    bounds = cu_seqlens.tolist()
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))  # [H, S, C]
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        scores = scale * (q @ k.transpose(1, 2))  # [Hq, S, S]
        positions = torch.arange(end - begin, device=q.device)
        scores = scores.masked_fill(~visible_keys(positions, positions, window), -torch.inf)
        outputs.append((scores.softmax(dim=-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def check_packed(
    op: str, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    scale: float, window: int | None,
) -> None:
    """Raise ShapeError where the inputs of an attention over packed sequences do not fit."""
    if query.dim() != 3 or key.dim() != 3 or key.shape != value.shape:
        raise ShapeError(
            f"{op}: expected query [N, Hq, C] and key and value [N, Hk, C], got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2]:
        raise ShapeError(
            f"{op}: query and key differ in tokens or channels: {list(query.shape)} "
            f"and {list(key.shape)}; both cover the same packed tokens"
        )
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ShapeError(
            f"{op}: expected query, key and value of one floating type, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if 0 in query.shape[1:] or 0 in key.shape[1:]:
        raise ShapeError(
            f"{op}: expected at least one head and one channel, got query "
            f"{list(query.shape)} and key {list(key.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise ShapeError(
            f"{op}: {query.shape[1]} query heads are not a multiple of "
            f"{key.shape[1]} KV heads"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype != torch.int64:
        raise ShapeError(
            f"{op}: expected cu_seqlens [B+1] int64, got {list(cu_seqlens.shape)} "
            f"{cu_seqlens.dtype}"
        )
    if max_seqlen < 1 or (window is not None and window < 1):
        raise ShapeError(
            f"{op}: max_seqlen and window must be at least 1, got {max_seqlen} and "
            f"{window}"
        )
    check_device(op, {"query": query, "key": key, "value": value, "cu_seqlens": cu_seqlens})
    check_positive(op, scale=scale)
    check_offsets(op, len(query), cu_seqlens=cu_seqlens)
    if not torch.compiler.is_compiling() and checks_values():
        longest = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
        if longest > max_seqlen:
            raise ShapeError(f"{op}: expected max_seqlen of at least {longest}, the "
                             f"longest sequence, got {max_seqlen} (FASTRL_CHECK=1)")
    check_values(op, query=query, key=key, value=value)


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    scale: float, window: int | None = None, backend: str | None = None,
) -> Tensor:
    """Causal self-attention of each sequence of a packed batch. Differentiable.

    The table at the head of the file says which kernel runs.

        out_i = sum_j softmax_j(scale * q_i . k_j) v_j      over j <= i, j > i - window

    Args:
        query: [N, Hq, C]. Query head h reads KV head h // (Hq / Hk).
        key, value: [N, Hk, C], dtype of query.
        cu_seqlens: [B+1] int64. Where each sequence begins; the last entry is N.
        max_seqlen: Tokens of the longest sequence, known to the host.
        scale: Factor of the scores, usually C ** -0.5.
        window: Keys a query may see, itself included; None sees all before it.
        backend: See fastrl.backends.
    Returns:
        [N, Hq, C], dtype of query.
    Raises:
        ShapeError: when shapes or dtypes do not fit together.
        ConfigError: when scale is not above 0.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: at most `MAX_PADDING` times the multiplications of the real tokens; one dense call per
        group of sequences of similar length.
    Source: Vaswani et al. 2017 (arXiv 1706.03762); window: Mistral 7B (arXiv 2310.06825).
    Example:
        >>> x = torch.ones(3, 1, 2)
        >>> cu = torch.tensor([0, 1, 3])
        >>> packed_attention(x, x, x, cu, max_seqlen=2, scale=1.0).shape
        torch.Size([3, 1, 2])
    """
    check_packed("packed_attention", query, key, value, cu_seqlens, max_seqlen, scale, window)
    N, _, C = query.shape
    device = query.device
    if window is not None and window >= max_seqlen:
        window = None
    has_equal_lengths = N == (len(cu_seqlens) - 1) * max_seqlen  # no longer one, so no shorter one
    capability = torch.cuda.get_device_properties(device).major if device.type == "cuda" else 0
    path = torch_path(device.type, query.dtype, C, max_seqlen, window, has_equal_lengths,
                      capability)
    name = choose("packed_attention", "packed_attention",
                  CUDNN_FIRST if path == "cudnn" else PREFERENCE, device.type, query.dtype, backend,
                  kernel_limits(C))
    if name == "triton":
        from fastrl_kernels.triton import packed_attention as triton_kernels

        return triton_kernels.packed_attention(query, key, value, cu_seqlens,
                                               max_seqlen=max_seqlen, scale=scale, window=window)
    if name == "flash":
        from fastrl_kernels.flash import packed_attention as flash_kernels

        return flash_kernels.packed_attention(query, key, value, cu_seqlens,
                                              max_seqlen=max_seqlen, scale=scale, window=window)
    if path == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out: Any = varlen_attn(  # a tuple only where more is asked for
            **varlen_arguments(query, key, value, cu_seqlens, max_seqlen, scale, window))
        return cast(Tensor, out)
    if path == "cudnn":
        with sdpa_kernel(CUDNN_ORDER, set_priority=True):
            return _attend_equal_lengths(query, key, value, max_seqlen, scale, window)
    if has_equal_lengths:
        return _attend_equal_lengths(query, key, value, max_seqlen, scale, window)
    return _attend_groups(query, key, value, cu_seqlens, scale, window)


def torch_path(
    device_type: str, dtype: torch.dtype, head_dim: int, max_seqlen: int, window: int | None,
    has_equal_lengths: bool, capability: int,
) -> str:
    """Which of torch's own kernels fits: "cudnn", "varlen" (no host read, no padding) or "dense".

    Args:
        capability: Major compute capability of the GPU: 8 Ampere, 9 Hopper, 10 Blackwell.
    """
    if device_type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or capability < 8:
        return "dense"
    if head_dim > MAX_KERNEL_CHANNELS or head_dim % 8 != 0:
        return "dense"
    is_faster_by_cudnn = capability == 9 and max_seqlen >= MIN_CUDNN_TOKENS
    if (is_faster_by_cudnn and has_equal_lengths and window is None
            and head_dim <= MAX_CUDNN_CHANNELS):
        return "cudnn"
    return "varlen"


def kernel_limits(head_dim: int) -> tuple[tuple[str, str], ...]:
    """(backend, reason) of the kernels that such heads rule out."""
    if head_dim <= MAX_KERNEL_CHANNELS:
        return ()
    reason = f"it takes at most {MAX_KERNEL_CHANNELS} channels per head, these have {head_dim}"
    return ("flash", reason), ("triton", reason)


def varlen_arguments(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float,
    window: int | None,
) -> dict[str, Any]:
    """What torch's `varlen_attn` is called with: its window is (keys to the left, to the right)."""
    from torch.nn.attention.varlen import varlen_attn

    cu = cu_seqlens.to(torch.int32)
    arguments = {
        "query": query, "key": key, "value": value, "cu_seq_q": cu, "cu_seq_k": cu,
        "max_q": max_seqlen, "max_k": max_seqlen, "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),
    }
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 asks for no consent
        arguments["enable_gqa"] = query.shape[1] != key.shape[1]
    return arguments


def _attend_equal_lengths(
    query: Tensor, key: Tensor, value: Tensor, length: int, scale: float, window: int | None
) -> Tensor:
    """One dense call on views of the inputs, or on padded copies where a CPU wants whole units."""
    q, k, v = (x.view(-1, length, *x.shape[1:]) for x in (query, key, value))
    missing = whole_units(length, query.device) - length
    if missing:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    return _dense_attention(q, k, v, scale, window)[:, :length].flatten(0, 1)


def _attend_groups(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float,
    window: int | None,
) -> Tensor:
    """Sequences of similar length are padded together: one dense causal call per group."""
    bounds = cu_seqlens.tolist()
    lengths = [end - begin for begin, end in zip(bounds[:-1], bounds[1:], strict=True)]
    outputs, rows = [], []
    for group in similar_lengths(lengths):
        longest = lengths[group[0]]
        if len(group) == 1:  # alone: nothing to pad, so nothing to copy
            alone = slice(bounds[group[0]], bounds[group[0] + 1])
            outputs.append(_attend_equal_lengths(query[alone], key[alone], value[alone], longest,
                                                 scale, window))
            rows.append(torch.arange(alone.start, alone.stop, device=query.device))
            continue
        members = torch.tensor(group, device=query.device)
        longest = whole_units(longest, query.device)
        offsets = torch.arange(longest, device=query.device)
        packed_rows = cu_seqlens[members, None] + offsets  # [b, S]
        real = packed_rows < cu_seqlens[members + 1, None]
        # Padding repeats the first row of the sequence: it stands after every real token, where
        # a causal query cannot see it.
        padded = torch.where(real, packed_rows, cu_seqlens[members, None]).flatten()
        q, k, v = (x.index_select(0, padded).view(len(group), longest, *x.shape[1:])
                   for x in (query, key, value))
        attended = _dense_attention(q, k, v, scale, window).flatten(0, 1)
        outputs.append(attended.index_select(0, real.flatten().nonzero().squeeze(-1)))
        rows.append(packed_rows[real])
    if not outputs:  # no tokens at all
        return query.clone()
    order = torch.cat(rows).argsort()
    return torch.cat(outputs).index_select(0, order)


def similar_lengths(lengths: list[int]) -> list[list[int]]:
    """Groups of indices, longest first, whose padded area is at most MAX_PADDING times its own.

    Empty sequences are in no group.
    """
    groups: list[list[int]] = []
    longest = total = 0
    present = [i for i, length in enumerate(lengths) if length > 0]
    for index in sorted(present, key=lambda i: -lengths[i]):
        total += lengths[index]
        if not groups or longest * (len(groups[-1]) + 1) > MAX_PADDING * total:
            groups.append([])
            longest = total = lengths[index]
        groups[-1].append(index)
    return groups


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """[B, S, Hq, C] from query [B, S, Hq, C] and key, value [B, S, Hk, C]."""
    length = query.shape[1]
    windowed = window is not None and window < length
    mask = None
    if windowed:
        positions = torch.arange(length, device=query.device)
        mask = visible_keys(positions, positions, window)
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask,
        is_causal=mask is None, scale=scale, enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
