"""Bytes of what a run keeps in memory, from shapes alone; docs/memory.md derives each formula.

Letters: N tokens of a pass, M those of them that are scored, D width, I inner width of the MLP, Hq
and Hk query and KV heads, C channels per head, V vocabulary; e bytes of a weight, w of the float32
(or wider) that sums are made in.
"""

from collections.abc import Sequence

import torch

from fastrl.checks import wide_dtype
from fastrl.models.by_input import MAX_COPY_BYTES
from fastrl.models.config import DecoderConfig
from fastrl.ops.adamw import LARGE_PIECE_ELEMENTS, PIECE_ELEMENTS
from fastrl.ops.linear_logprob import CHUNK_BYTES
from fastrl.state_formats import BLOCK_SIZE, num_blocks

GIB = 2**30


def weight_bytes(numels: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the weights; their gradients, in the same dtype, take as many."""
    return sum(numels) * dtype.itemsize


def optimizer_bytes(numels: Sequence[int], dtype: torch.dtype, moments: str) -> int:
    """Bytes of what `AdamW` keeps for the weights: two moments, and the remainder of bf16."""
    total = sum(numels)
    if moments == "8bit":
        kept = 2 * total + 2 * 4 * sum(map(num_blocks, numels))
    else:
        kept = 2 * total * wide_dtype(dtype).itemsize
    return kept + (2 * total if dtype == torch.bfloat16 else 0)


def ema_bytes(numels: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of the moving average of the weights."""
    return sum(numels) * wide_dtype(dtype).itemsize


def kv_bytes(decoder: DecoderConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Bytes of keys and values of `num_tokens` tokens."""
    return (2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * dtype.itemsize
            * num_tokens)


def layer_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, *, has_dropout: bool = False, device_type: str
) -> int:
    """Bytes per token that the forward of one layer leaves for its backward."""
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    D, inner, C = decoder.hidden_size, decoder.intermediate_size, decoder.head_dim
    Hq, Hk = decoder.num_heads, decoder.num_kv_heads
    norms = 2 * (_norm_bytes(decoder, dtype, device_type) + e * D)  # and what the product reads
    if decoder.parallel_residual:
        norms -= e * D if decoder.norm == "layer" or e == w else 0  # both norms read one stream
    attention = e * C * (Hq + 2 * Hk) + e * C * Hq + 4 * Hq  # projections, result, log-sums
    if decoder.rotary_dim:
        attention += e * C * (Hq + Hk)  # queries and keys after the rotation
    if decoder.qk_norm:
        attention += (e * C + w) * (Hq + Hk) + (w * C * (Hq + Hk) if e != w else 0)
    if decoder.gated_mlp:
        mlp = e * 4 * inner  # gate and up, the activated gate, the product
    else:
        mlp = e * inner * (1 if decoder.activation == "relu" else 2)
    dropout = 2 * D * (1 if device_type == "cuda" else e) if has_dropout else 0
    return norms + attention + mlp + dropout


def base_bytes(decoder: DecoderConfig, dtype: torch.dtype, *, device_type: str) -> int:
    """Bytes per token that embedding, angles and the last norm leave for backward."""
    angles = decoder.rotary_dim * dtype.itemsize
    ids = 8 if decoder.rotary_dim else 16
    return ids + angles + _norm_bytes(decoder, dtype, device_type)


def _norm_bytes(decoder: DecoderConfig, dtype: torch.dtype, device_type: str) -> int:
    """Bytes per token that a norm leaves for its backward."""
    e, w, D = dtype.itemsize, wide_dtype(dtype).itemsize, decoder.hidden_size
    if decoder.norm == "rms":
        return w * D + e * D + w  # the input, wide; the normed input; its scale
    return e * D + 2 * (w if device_type == "cuda" else e)  # the input, its mean and scale


def checkpoint_bytes(decoder: DecoderConfig, dtype: torch.dtype) -> int:
    """Bytes per token that a checkpointed layer keeps: what is added, and the stream."""
    return 2 * dtype.itemsize * decoder.hidden_size


def activation_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, num_tokens: int, *, device_type: str,
    is_checkpointed: bool = False, has_dropout: bool = False,
) -> int:
    """Most bytes that forward and backward through a trunk hold beside weights and gradients.

    Backward through a layer needs its gradients beside what the forward left; with checkpointing
    a layer keeps its two inputs, and what it left exists again while it runs backward.
    """
    e, D, inner = dtype.itemsize, decoder.hidden_size, decoder.intermediate_size
    layer = layer_bytes(decoder, dtype, has_dropout=has_dropout, device_type=device_type)
    gradients = e * (2 * D + (4 if decoder.gated_mlp else 2) * inner)
    left = decoder.num_layers * layer
    if is_checkpointed:
        left = decoder.num_layers * checkpoint_bytes(decoder, dtype) + layer
    return num_tokens * (base_bytes(decoder, dtype, device_type=device_type) + left + gradients)


def adapter_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, num_tokens: int, width: int
) -> int:
    """Bytes that LoRA adapters add to forward and backward through a trunk.

    Args:
        width: Numbers per token of all first products, which are kept; 0: no adapters. One scaled
            gradient of the widest matrix passes through.
    """
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    widest = max(heads * decoder.head_dim, decoder.intermediate_size * (1 + decoder.gated_mlp))
    return num_tokens * dtype.itemsize * (width + widest) if width else 0


def forward_bytes(decoder: DecoderConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Most bytes that a pass without gradient holds: those of one layer."""
    e, w, D = dtype.itemsize, wide_dtype(dtype).itemsize, decoder.hidden_size
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    attention = e * (2 * D + 2 * heads * decoder.head_dim)
    mlp = e * (2 * D + (4 if decoder.gated_mlp else 2) * decoder.intermediate_size)
    return num_tokens * max(attention, mlp, e * 2 * D + w * 2 * D)


def _chunk_bytes(decoder: DecoderConfig, num_rows: int, itemsize: int) -> int:
    """The two buffers of a chunk of logits."""
    row = decoder.vocab_size * itemsize
    return 2 * min(max(1, CHUNK_BYTES // row), num_rows) * row


def loss_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, num_rows: int, *, has_frozen_head: bool = False
) -> int:
    """Most bytes of `linear_policy_loss` or `linear_cross_entropy` over M rows, with gradient.

    Forward: the gradient of the head in float32, a float32 copy of a half-precision head, two
    buffers of a chunk. Backward: that gradient, its product with the factor, and its rounding.
    """
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    head = decoder.vocab_size * decoder.hidden_size
    rows = num_rows * decoder.hidden_size * (2 * e + w)
    forward = (head * w if e != w else 0) + _chunk_bytes(decoder, num_rows, w)
    if has_frozen_head:
        return rows + forward
    backward = head * w + (head * e if e != w else 0)
    return rows + head * w + max(forward, backward)


def logprob_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, num_rows: int, *, has_frozen_head: bool = False
) -> int:
    """Most bytes of `linear_logprobs` over M rows, with gradient.

    Backward: a half-precision head in float32, two buffers of a chunk, the gradient of the head in
    float32 and rounded; for each row its state, the gradient of that, and its place in the stream.
    """
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    head = decoder.vocab_size * decoder.hidden_size
    rows = num_rows * decoder.hidden_size * (2 * e + w)
    chunk = _chunk_bytes(decoder, num_rows, w)
    if has_frozen_head:
        return rows + (head * w if e != w else 0) + chunk
    return rows + head * w + (head * (w + e) if e != w else 0) + chunk


def scoring_bytes(decoder: DecoderConfig, dtype: torch.dtype, num_rows: int) -> int:
    """Most bytes of `linear_logprobs` over M rows, without gradient."""
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    head = decoder.vocab_size * decoder.hidden_size * w if e != w else 0
    return head + _chunk_bytes(decoder, num_rows, w) + num_rows * decoder.hidden_size * (e + w)


def scalar_bytes(decoder: DecoderConfig, dtype: torch.dtype, num_tokens: int) -> int:
    """Most bytes of a scalar head: the states in float32 and their product with the weight."""
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    return num_tokens * decoder.hidden_size * (w + (w if e != w else 0))


def copy_bytes(decoder: DecoderConfig, dtype: torch.dtype, *, device_type: str) -> int:
    """Matrices that the engine stores once more, by input, for a small model on a CPU."""
    width, heads = decoder.hidden_size, decoder.num_heads * decoder.head_dim
    merged = heads + 2 * decoder.num_kv_heads * decoder.head_dim
    inner = decoder.intermediate_size * (2 + decoder.gated_mlp)
    layer = width * (merged + heads + inner)
    num_bytes = (decoder.num_layers * layer + decoder.vocab_size * width) * dtype.itemsize
    is_small = device_type == "cpu" and dtype == torch.float32 and num_bytes <= MAX_COPY_BYTES
    return num_bytes if is_small else 0


def sampling_bytes(
    decoder: DecoderConfig, dtype: torch.dtype, num_rows: int, *, device_type: str
) -> int:
    """Most bytes of a decode step's logits: a row each, and what the sampler makes of them."""
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    row = decoder.vocab_size * w
    if device_type == "cuda":
        return 2 * num_rows * row
    head = decoder.vocab_size * decoder.hidden_size * w if e != w else 0
    return num_rows * row + head + _chunk_bytes(decoder, num_rows, w)


def scratch_bytes(
    numels: Sequence[int], dtype: torch.dtype, moments: str, *, device_type: str
) -> int:
    """Most bytes of an optimiser step beside weights, gradients and state.

    A piece passes through two wide numbers per element, one more for bf16 weights (their exact
    value) with a byte of mask, two more for the moments of 8 bits, in whole blocks, with a unit and
    a byte of mask for each; small tensors lie end to end, all that is read of them.
    """
    e, w = dtype.itemsize, wide_dtype(dtype).itemsize
    is_narrow, is_8bit = dtype == torch.bfloat16, moments == "8bit"
    limit = PIECE_ELEMENTS.get(device_type, LARGE_PIECE_ELEMENTS)
    small = 0 if is_8bit else min(limit, sum(n for n in numels if n <= limit // 8))
    piece = min(limit, max(small, *numels))
    blocks = num_blocks(piece)
    masks = piece if is_narrow else blocks * is_8bit
    return (blocks * BLOCK_SIZE * w * (2 + is_narrow + 2 * is_8bit) + masks + 4 * blocks * is_8bit
            + small * (2 * w + 2 * e + 2 * is_narrow))
