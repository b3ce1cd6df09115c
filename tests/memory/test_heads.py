"""Bytes of heads and of one pass: by hand from shapes, and beside what the operations hold."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrl.memory import sizes
from fastrl.models.config import DecoderConfig
from fastrl.models.families import decoder_config
from fastrl.models.heads import ScalarHead
from fastrl.ops import linear_cross_entropy, linear_logprob, linear_logprobs

MostBytes = runpy.run_path(str(Path(__file__).with_name("most_bytes.py")))["MostBytes"]
F32, BF16 = torch.float32, torch.bfloat16
MIB = 2**20
D, INNER, HEADS, KV, C = 64, 104, 4, 2, 16


def decoder(family: str = "llama", vocab_size: int = 1000) -> DecoderConfig:
    """Sizes that no two quantities share; gpt2 and gpt_neox have as many KV heads as heads."""
    kv_heads = None if family in ("gpt2", "gpt_neox") else KV
    return decoder_config(family, vocab_size=vocab_size, hidden_size=D, num_layers=3,  # type: ignore[arg-type]
                          num_heads=HEADS, num_kv_heads=kv_heads, intermediate_size=INNER,
                          max_positions=64)


@pytest.mark.parametrize(("vocab_size", "rows", "chunk"), [
    (1000, 7, 2 * 7 * 1000 * 4),  # all rows are one chunk
    (1000, 500, 2 * 500 * 1000 * 4),  # and take more than the head
    (2**20, 100, 2 * 6 * 4 * MIB),  # 6 rows of 4 MiB in 24 MiB
    (2**23, 100, 2 * 1 * 32 * MIB),  # one row is more than that
])
def test_heads_by_hand(vocab_size: int, rows: int, chunk: int) -> None:
    """Two buffers of a chunk of float32 logits; per row a state, its gradient and its place."""
    shape, head = decoder(vocab_size=vocab_size), vocab_size * D
    assert sizes.scoring_bytes(shape, F32, rows) == chunk + rows * D * (4 + 4)
    assert sizes.scoring_bytes(shape, BF16, rows) == chunk + rows * D * (2 + 4) + 4 * head
    # With a gradient, which for the head is in float32; bf16 has the head in float32 beside it,
    # and in the end the gradient again as bf16.
    assert sizes.logprob_bytes(shape, F32, rows) == chunk + rows * D * (4 + 4 + 4) + 4 * head
    assert sizes.logprob_bytes(shape, BF16, rows) == (
        chunk + rows * D * (2 + 2 + 4) + (4 + 4 + 2) * head)
    # The loss makes the head's gradient in the forward pass; then it is multiplied and rounded.
    assert sizes.loss_bytes(shape, F32, rows) == (
        rows * D * (4 + 4 + 4) + 4 * head + max(chunk, 4 * head))
    assert sizes.loss_bytes(shape, BF16, rows) == (
        rows * D * (2 + 2 + 4) + 4 * head + max(4 * head + chunk, (4 + 2) * head))
    # A frozen head has none: states, the head in float32 and the chunk are left.
    for num_bytes in (sizes.loss_bytes, sizes.logprob_bytes):
        assert num_bytes(shape, F32, rows, has_frozen_head=True) == chunk + rows * D * (4 + 4 + 4)
        assert num_bytes(shape, BF16, rows, has_frozen_head=True) == (
            chunk + rows * D * (2 + 2 + 4) + 4 * head)


def test_scalar_heads_and_samplers_by_hand() -> None:
    shape, head = decoder(), 1000 * D
    assert sizes.scalar_bytes(shape, F32, 7) == 7 * D * 4  # the product with the weight
    assert sizes.scalar_bytes(shape, BF16, 7) == 7 * D * (4 + 4)  # and the states before it
    row = 1000 * 4
    # A GPU: logits of each row, and what the sampler sorts or sums.
    for dtype in (F32, BF16):
        assert sizes.sampling_bytes(shape, dtype, 7, device_type="cuda") == 2 * 7 * row
    # A CPU: logits, two buffers of a chunk, and a half-precision head in float32.
    assert sizes.sampling_bytes(shape, F32, 7, device_type="cpu") == (1 + 2) * 7 * row
    assert sizes.sampling_bytes(shape, BF16, 7, device_type="cpu") == (1 + 2) * 7 * row + 4 * head


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("kind", ["scoring", "logprob", "loss", "scalar"])
def test_heads_hold_what_is_planned(kind: str, dtype: torch.dtype,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the head decides, with chunks of a few rows, and once the rows: to a fifth."""
    for rows, vocab_size in ((64, 1500), (1024, 160)):
        chunk_bytes = 8 * vocab_size * 4 if rows == 64 else rows * vocab_size * 4
        monkeypatch.setattr(linear_logprob, "CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(sizes, "CHUNK_BYTES", chunk_bytes)
        shape = decoder(vocab_size=vocab_size)
        stream = torch.ones(rows, D, dtype=dtype, requires_grad=True)
        weight = torch.ones(vocab_size, D, dtype=dtype, requires_grad=True)
        token_ids, places = torch.zeros(rows, dtype=torch.int64), torch.arange(rows)
        scalar = ScalarHead(nn.Parameter(torch.ones(D, dtype=dtype)))
        with MostBytes() as memory:
            if kind == "scoring":
                with torch.no_grad():
                    linear_logprobs(stream[places], weight, token_ids)
                planned = sizes.scoring_bytes(shape, dtype, rows)
            elif kind == "logprob":
                linear_logprobs(stream[places], weight, token_ids)[0].sum().backward()
                planned = sizes.logprob_bytes(shape, dtype, rows)
            elif kind == "loss":
                linear_cross_entropy(stream[places], weight, token_ids, denominator=1.0).backward()
                planned = sizes.loss_bytes(shape, dtype, rows)
            else:  # backward's gradients of states are among those of a layer
                scalar(stream)
                planned = sizes.scalar_bytes(shape, dtype, rows)
        assert memory.most == pytest.approx(planned, rel=0.2), (rows, memory.most, planned)


def test_what_a_gpu_keeps_of_norms_and_dropout() -> None:
    """LayerNorm's mean and scale are float32 there, in bf16 too; a mask of dropout is a byte."""
    for dtype, e in ((F32, 4), (BF16, 2)):
        for family in ("gpt2", "gpt_neox", "llama"):
            shape = decoder(family)
            on = {device: sizes.layer_bytes(shape, dtype, device_type=device)
                  for device in ("cpu", "cuda")}
            more = 0 if family == "llama" else 2 * 2 * (4 - e)  # two norms, two numbers each
            assert on["cuda"] - on["cpu"] == more
            base = {device: sizes.base_bytes(shape, dtype, device_type=device)
                    for device in ("cpu", "cuda")}
            assert base["cuda"] - base["cpu"] == more // 2
            dropped = sizes.layer_bytes(shape, dtype, has_dropout=True, device_type="cuda")
            assert dropped - on["cuda"] == 2 * D


def test_activations_by_hand() -> None:
    """What every layer left, beside the gradients of one; or two inputs of each, and one layer."""
    for family, wide in (("llama", 4), ("gpt2", 2)):
        shape = decoder(family)
        gradients = 4 * (2 * D + wide * INNER)
        layer = sizes.layer_bytes(shape, F32, device_type="cpu")
        base = sizes.base_bytes(shape, F32, device_type="cpu")
        assert sizes.activation_bytes(shape, F32, 10, device_type="cpu") == 10 * (
            base + 3 * layer + gradients)
        assert sizes.activation_bytes(
            shape, F32, 10, device_type="cpu", is_checkpointed=True) == 10 * (
            base + 3 * (4 * 2 * D) + layer + gradients)


def test_a_pass_without_gradient_by_hand() -> None:
    """The largest of attention (stream, normed, projections, and again rotated or gathered), MLP
    and norm (stream and sum, both wide once)."""
    shape = decoder()
    heads = HEADS + 2 * KV
    for dtype, e in ((F32, 4), (BF16, 2)):
        mlp = e * (2 * D + 4 * INNER)
        assert sizes.forward_bytes(shape, dtype, 10) == 10 * mlp
        narrow = replace(shape, intermediate_size=8)
        assert sizes.forward_bytes(narrow, dtype, 10) == 10 * max(
            e * (2 * D + 2 * heads * C), e * 2 * D + 4 * 2 * D)
        assert sizes.forward_bytes(replace(narrow, gated_mlp=False, intermediate_size=160), dtype,
                                   10) == 10 * max(e * (2 * D + 2 * 160), e * 2 * D + 4 * 2 * D)
    thin = replace(decoder(), intermediate_size=8, num_heads=1, num_kv_heads=1, head_dim=8,
                   rotary_dim=8)
    assert sizes.forward_bytes(thin, F32, 10) == 10 * (4 * 2 * D + 4 * 2 * D)
    assert sizes.forward_bytes(thin, BF16, 10) == 10 * (2 * 2 * D + 4 * 2 * D)


def test_adapters_by_hand() -> None:
    """Rank 8 on query, key, value and up, for 3 layers: 3 x (3 + 1) x 8 numbers per token, and the
    scaled gradient of gate and up, or of the projections where those are wider."""
    width = 3 * (3 + 1) * 8
    for dtype, e in ((F32, 4), (BF16, 2)):
        assert sizes.adapter_bytes(decoder(), dtype, 10, width) == 10 * e * (width + 2 * INNER)
        narrow = replace(decoder(), intermediate_size=8)
        assert sizes.adapter_bytes(narrow, dtype, 10, width) == 10 * e * (
            width + (HEADS + 2 * KV) * C)
        plain = decoder("gpt2")
        assert sizes.adapter_bytes(plain, dtype, 10, width) == 10 * e * (width + 3 * HEADS * C)
        assert sizes.adapter_bytes(decoder(), dtype, 10, 0) == 0


def test_scratch_by_hand() -> None:
    """Pieces of 2^16 elements on a CPU and 2^26 on a GPU: 8 bytes per element, bf16 one number and
    a byte more, 8 bits two numbers more with 5 or 4 bytes per block. Up to an eighth of a piece
    tensors are laid end to end: weight, gradient, two moments, and in bf16 a remainder."""
    for device, limit in (("cpu", 2**16), ("cuda", 2**26)):
        small = limit // 8
        for dtype, passing, joined in ((F32, 8, 16), (BF16, 13, 14)):
            for numels, piece, ends in (
                    ([limit], limit, 0), ([3 * limit], limit, 0), ([small + 1] * 3, small + 256, 0),
                    ([limit, small, 256], limit, small + 256), ([small] * 9, limit, limit),
                    ([256], 256, 256)):
                floats = passing // 4 * 4 * piece  # in whole blocks
                masks = (passing % 4) * min(piece, max(ends, *numels))
                assert sizes.scratch_bytes(numels, dtype, "float32", device_type=device) == (
                    floats + masks + joined * ends), (dtype, numels)
    assert sizes.scratch_bytes([2**17, 100], F32, "8bit", device_type="cpu") == (
        16 * 2**16 + 5 * 2**16 // 256)
    assert sizes.scratch_bytes([2**17, 100], BF16, "8bit", device_type="cpu") == (
        21 * 2**16 + 4 * 2**16 // 256)


def test_small_copies_by_hand() -> None:
    """Up to 256 MiB in float32: the matrices of 3 layers and the unembedding."""
    projections, mlp = D * (HEADS + 2 * KV) * C + HEADS * C * D, 3 * D * INNER
    assert sizes.copy_bytes(decoder(), F32, device_type="cpu") == 4 * (
        3 * (projections + mlp) + 1000 * D)
    layers = 3 * (projections + mlp)
    largest = (256 * MIB // 4 - layers) // D  # rows of the unembedding that still fit
    assert sizes.copy_bytes(decoder(vocab_size=largest), F32, device_type="cpu") > 0
    assert sizes.copy_bytes(decoder(vocab_size=largest + 1), F32, device_type="cpu") == 0
