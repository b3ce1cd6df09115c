"""The formulas of fastrl.memory.sizes beside what torch really keeps."""

import runpy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastrl.config import SFTConfig
from fastrl.engine.cache import KVCache
from fastrl.memory import sizes
from fastrl.memory.shapes import (
    NAMED,
    shape_named,
    shape_of_config,
    shape_of_model,
    with_adapters,
)
from fastrl.models import new_decoder
from fastrl.models.attention import PackedAttention
from fastrl.models.by_input import matrices
from fastrl.models.config import DecoderConfig
from fastrl.models.families import decoder_config
from fastrl.models.lora import adapt
from fastrl.ops import adamw, linear_cross_entropy, linear_logprobs
from fastrl.optim import EMA, AdamW

MostBytes = runpy.run_path(str(Path(__file__).with_name("most_bytes.py")))["MostBytes"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
N = 32  # a CPU pads lengths to whole sixteens


def small_config(family: str, num_layers: int = 2) -> DecoderConfig:
    """Sizes that no two quantities share, so that a wrong one shows."""
    kv_heads = None if family in ("gpt2", "gpt_neox") else 2
    return decoder_config(family, vocab_size=37, hidden_size=64, num_layers=num_layers,  # type: ignore[arg-type]
                          num_heads=4, num_kv_heads=kv_heads, intermediate_size=104,
                          max_positions=64)


def kept_for_backward(backbone: nn.Module, lengths: Sequence[int] = (N,)) -> int:
    """Bytes that a forward leaves for backward: every storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights:
            kept.setdefault(address, tensor)
        return tensor

    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0), max(lengths))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = backbone(torch.randint(37, (sum(lengths),)), positions, attention)
    bounds = 8 * (len(lengths) + 1)  # the checkpoints of layers keep them; not a matter of tokens
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    del out
    return total - bounds * any(t.dtype == torch.int64 and len(t) == len(lengths) + 1
                                for t in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_the_forward_keeps(family: str, dtype: torch.dtype) -> None:
    config = small_config(family)
    decoder = new_decoder(config, 0, dtype=dtype).backbone
    layer = sizes.layer_bytes(config, dtype, device_type="cpu")
    base = sizes.base_bytes(config, dtype, device_type="cpu")
    assert kept_for_backward(decoder) == N * (2 * layer + base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_adapters_keep_their_first_products(family: str, dtype: torch.dtype) -> None:
    """The first layer's input needs no gradient, so that its norms keep less than the others."""
    config = small_config(family)
    model = new_decoder(config, 0, dtype=dtype)
    adapt(model, SFTConfig(lora_rank=3))
    shape = shape_of_model("policy", model)
    planned = with_adapters(shape_of_config("policy", config), SFTConfig(lora_rank=3))
    assert replace(planned, adapters=tuple(sorted(planned.adapters))) == (
        replace(shape, adapters=tuple(sorted(shape.adapters))))
    layer = sizes.layer_bytes(config, dtype, device_type="cpu")
    base = sizes.base_bytes(config, dtype, device_type="cpu")
    kept = N * (2 * layer + base + shape.adapter_width * dtype.itemsize)
    first = kept - kept_for_backward(model.backbone)
    assert 0 <= first <= N * (layer + base) / 2
    transient = max(config.intermediate_size * (1 + config.gated_mlp),
                    (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    assert sizes.adapter_bytes(config, dtype, N, shape.adapter_width) == (
        N * dtype.itemsize * (shape.adapter_width + transient))


def test_bytes_of_a_model_with_adapters() -> None:
    """By hand: rank 2 on q (64 x 64), k and v (32 x 64 each), o, gate, up and down, two layers."""
    config = small_config("llama")
    shape = with_adapters(shape_of_config("policy", config), SFTConfig(lora_rank=2))
    attention, mlp = 3 * 64 + 64 + 32 + 32 + 64 + 64, 2 * 64 + 2 * 104 + 104 + 64
    per_layer = 2 * (attention + mlp)
    assert sum(shape.adapters) == 2 * per_layer
    assert shape.adapter_width == 2 * 2 * 7
    assert sum(shape.trained_language_model) == 2 * per_layer
    assert sum(shape.trained_scalar_model) == 2 * per_layer + 64
    assert sum(shape.language_model) == sum(shape.trunk) + 37 * 64 * (not config.tie_embeddings) + (
        2 * per_layer)
    assert shape.has_frozen_head
    headed = with_adapters(shape_of_config("policy", config),
                           SFTConfig(lora_rank=2, lora_targets=("lm_head",)))
    assert sum(headed.adapters) == 2 * (37 + 64) and not headed.has_frozen_head
    assert headed.joined_head_bytes(torch.bfloat16) == 2 * 37 * 64
    assert shape.joined_head_bytes(torch.bfloat16) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_norms_of_a_parallel_residual_share_their_input(family: str, dtype: torch.dtype) -> None:
    """But where each makes a wide copy of it; no family has RMS norms and a parallel residual."""
    config = replace(small_config(family), parallel_residual=True)
    decoder = new_decoder(config, 0, dtype=dtype).backbone
    layer = sizes.layer_bytes(config, dtype, device_type="cpu")
    base = sizes.base_bytes(config, dtype, device_type="cpu")
    assert kept_for_backward(decoder) == N * (2 * layer + base)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_keeps_its_masks(family: str) -> None:
    config = small_config(family)
    decoder = new_decoder(config, 0).backbone.train()
    decoder.residual_dropout = 0.2
    layer = sizes.layer_bytes(config, torch.float32, has_dropout=True, device_type="cpu")
    base = sizes.base_bytes(config, torch.float32, device_type="cpu")
    assert kept_for_backward(decoder) == N * (2 * layer + base)


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_keep_their_inputs(family: str) -> None:
    kept = {}
    for num_layers in (2, 3):
        decoder = new_decoder(small_config(family, num_layers), 0).backbone
        decoder.activation_checkpointing = True
        kept[num_layers] = kept_for_backward(decoder)
    assert kept[3] - kept[2] == N * sizes.checkpoint_bytes(small_config(family), torch.float32)


def test_ragged_sequences_keep_as_much_as_equal_ones_to_a_quarter() -> None:
    """The dense kernel of a CPU pads; a budget of tokens has to hold for any lengths."""
    config = small_config("llama")
    decoder = new_decoder(config, 0).backbone
    planned = 56 * (2 * sizes.layer_bytes(config, torch.float32, device_type="cpu")
                    + sizes.base_bytes(config, torch.float32, device_type="cpu"))
    assert kept_for_backward(decoder, (3, 20, 17, 16)) == pytest.approx(planned, rel=0.25)


def test_optimizer_average_and_weights_take_what_they_say() -> None:
    model = new_decoder(small_config("llama"), 0, dtype=torch.bfloat16)
    numels = shape_of_model("policy", model).language_model
    for moments in ("float32", "8bit"):
        state = AdamW(model.parameters(), moments=moments).state_dict()
        kept = sum(t.nbytes for name, t in state.items() if name != "num_steps")
        assert sizes.optimizer_bytes(numels, torch.bfloat16, moments) == kept
    assert sizes.weight_bytes(numels, torch.bfloat16) == sum(p.nbytes for p in model.parameters())
    average = EMA(model.parameters(), 0.9).state_dict()
    assert sizes.ema_bytes(numels, torch.bfloat16) == sum(t.nbytes for t in average.values())


def test_kv_bytes_are_those_of_the_cache() -> None:
    config = small_config("qwen3")
    cache = KVCache(config.spec, 5, 16, torch.bfloat16, torch.device("cpu"))
    assert sizes.kv_bytes(config, torch.bfloat16, 80) == cache.kv_pages.nbytes


def test_bytes_per_token_of_the_published_models() -> None:
    """../shared/reference/kernels.md, section 2.1: KB of keys and values per token in bf16."""
    for name, kilobytes in (("qwen3-0.6b", 115), ("qwen3-1.7b", 115), ("qwen3-4b", 147),
                            ("llama-3.1-8b", 131), ("qwen3-8b", 147)):
        num_bytes = sizes.kv_bytes(shape_named(name).decoder, torch.bfloat16, 1)
        assert round(num_bytes / 1000) == kilobytes


def test_parameters_of_the_published_models() -> None:
    """The totals of the model cards, to the last one."""
    totals = {"qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
              "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
              "qwen3-32b": 32_762_123_264, "llama-3.2-1b": 1_235_814_400,
              "llama-3.2-3b": 3_212_749_824, "llama-3.1-8b": 8_030_261_248}
    assert totals.keys() == NAMED.keys()
    for name, total in totals.items():
        assert sum(shape_named(name).language_model) == total


@pytest.mark.parametrize("moments", ["float32", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_of_the_optimiser(dtype: torch.dtype, moments: str) -> None:
    """The plan is what a step holds, but for some scalars."""
    weights = [torch.ones(1 << 20, dtype=dtype), torch.ones(1000, dtype=dtype)]
    optimizer = AdamW([w.requires_grad_() for w in weights], moments=moments)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    planned = sizes.scratch_bytes([w.numel() for w in weights], dtype, moments, device_type="cuda")
    with pytest.MonkeyPatch.context() as patch, MostBytes() as memory:
        patch.setitem(adamw.PIECE_ELEMENTS, "cpu", adamw.LARGE_PIECE_ELEMENTS)
        optimizer.step(1e-3)
    assert planned <= memory.most <= planned + 256


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_by_input_are_those_that_the_engine_makes(family: str) -> None:
    config = small_config(family)
    modules = matrices(new_decoder(config, 0))
    assert sizes.copy_bytes(config, torch.float32, device_type="cpu") == sum(
        module.weight.numel() * 4 for module in modules)
    assert sizes.copy_bytes(config, torch.bfloat16, device_type="cpu") == 0
    assert sizes.copy_bytes(config, torch.float32, device_type="cuda") == 0
    large = replace(config, vocab_size=2**20 + 1)
    assert sizes.copy_bytes(large, torch.float32, device_type="cpu") == 0


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_of_a_frozen_head_is_made(dtype: torch.dtype, is_frozen: bool) -> None:
    """The plans of both losses cover what forward and backward hold, and are not far above it."""
    config = replace(small_config("llama"), vocab_size=20_000, hidden_size=48)
    weight = torch.randn(20_000, 48).to(dtype).requires_grad_(not is_frozen)
    hidden = torch.randn(16, 48).to(dtype).requires_grad_()
    token_ids = torch.arange(16)
    with MostBytes() as memory:
        linear_cross_entropy(hidden, weight, token_ids, denominator=16).backward()
    planned = sizes.loss_bytes(config, dtype, 16, has_frozen_head=is_frozen)
    assert 0.6 * planned <= memory.most <= 1.1 * planned
    weight.grad = hidden.grad = None
    with MostBytes() as memory:
        linear_logprobs(hidden, weight, token_ids)[0].sum().backward()
    planned = sizes.logprob_bytes(config, dtype, 16, has_frozen_head=is_frozen)
    assert 0.6 * planned <= memory.most <= 1.1 * planned
