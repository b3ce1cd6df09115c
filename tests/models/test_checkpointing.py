"""Layers that run again in backward: the same gradients from fewer saved tensors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrl.backends import use_backend
from fastrl.errors import ModelError
from fastrl.models import (
    CausalLM,
    PackedAttention,
    load_causal_lm,
    new_decoder,
    save_causal_lm,
    scalar_from_causal,
)
from fastrl.models.decoder import Decoder, DecoderConfig
from fastrl.models.hf import HFBackbone
from fastrl.packing import pack_sequences

SEQUENCES = ([5, 7, 10, 9, 3, 3, 8, 12, 4], [4, 11, 3], [6], [1, 2, 3, 4, 5])


def decoder(num_layers: int = 3, **changes: Any) -> CausalLM:
    return new_decoder(DecoderConfig(**{
        "family": "llama", "vocab_size": 13, "hidden_size": 16, "num_layers": num_layers,
        "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8,
        "intermediate_size": 24, "max_positions": 32, "initializer_range": 0.4, **changes}), seed=0)


def forward(model: Any) -> Tensor:
    batch = pack_sequences(SEQUENCES)
    out: Tensor = model(batch.token_ids, batch.positions,
                        PackedAttention(batch.cu_seqlens, batch.max_seqlen))
    return out


def gradients(model: Any, checkpointing: bool) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of all weights."""
    model.backbone.activation_checkpointing = checkpointing
    model.zero_grad()
    out = forward(model)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def saved_bytes(model: Any, checkpointing: bool) -> int:
    """Bytes that a forward pass keeps for backward, weights aside."""
    model.backbone.activation_checkpointing = checkpointing
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(seen.values())


CHANGES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen3": {"qk_norm": True},
    "gpt2": {"norm": "layer", "activation": "gelu_new", "gated_mlp": False, "rotary_dim": 0,
             "qkv_bias": True, "mlp_bias": True, "tie_embeddings": True},
    "gpt_neox": {"parallel_residual": True}}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_have_the_same_bits(name: str, dtype: torch.dtype) -> None:
    model = decoder(**CHANGES[name]).to(dtype)
    out, expected = gradients(model, checkpointing=False)
    again, ours = gradients(model, checkpointing=True)
    assert torch.equal(out, again) and len(expected) > 10
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))


def test_a_scalar_model_and_its_head() -> None:
    model = scalar_from_causal(decoder(), seed=1)
    _, expected = gradients(model, checkpointing=False)
    _, ours = gradients(model, checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))


def test_every_layer_runs_twice_and_only_with_gradient() -> None:
    model, runs = decoder(), list[int]()
    for number, layer in enumerate(model.backbone.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    gradients(model, checkpointing=True)
    assert runs == [0, 1, 2, 2, 1, 0]
    runs.clear()
    with torch.no_grad():
        forward(model)
    assert runs == [0, 1, 2]


def test_fewer_tensors_are_saved() -> None:
    """Per layer its two inputs of [N, D] are left; N is 18, D 16, four bytes each."""
    plain = [saved_bytes(decoder(n), checkpointing=False) for n in (2, 6)]
    fewer = [saved_bytes(decoder(n), checkpointing=True) for n in (2, 6)]
    assert (fewer[1] - fewer[0]) / 4 == 2 * 18 * 16 * 4
    assert plain[1] - plain[0] > 5 * (fewer[1] - fewer[0])


def test_dropout_draws_the_same_numbers_twice() -> None:
    def run(checkpointing: bool) -> tuple[Tensor, list[Tensor]]:
        model = decoder().train()
        model.backbone.residual_dropout = 0.5
        torch.manual_seed(3)
        return gradients(model, checkpointing)

    (out, expected), (again, ours) = run(False), run(True)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))
    assert not torch.equal(out, gradients(decoder(), True)[0])  # it was on


def test_the_second_run_takes_the_backend_of_the_first() -> None:
    """Backward may run in another thread, where `use_backend` was never called."""
    from fastrl import backends

    model, seen = decoder(1), list[str | None]()
    model.backbone.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(backends._current.get()))
    model.backbone.activation_checkpointing = True
    with use_backend("torch"):
        out = forward(model)
    out.sum().backward()
    assert seen == ["torch", "torch"]


def test_a_copy_keeps_the_setting_and_stands_alone() -> None:
    model = decoder()
    model.backbone.activation_checkpointing = True
    copied = copy.deepcopy(model)
    model.backbone.activation_checkpointing = False
    assert copied.backbone.activation_checkpointing
    assert isinstance(copied.backbone, Decoder)


@pytest.mark.parametrize("name", ["opt", "phi3"])
def test_models_that_run_through_transformers(
    name: str, checkpoint: Callable[..., Any], tmp_path: Any
) -> None:
    model = load_causal_lm(checkpoint(name).folder).train()  # its dropout must stay off
    assert isinstance(model.backbone, HFBackbone)
    out, expected = gradients(model, checkpointing=False)
    plain = saved_bytes(model, checkpointing=False)
    again, ours = gradients(model, checkpointing=True)
    assert torch.equal(out, again)
    assert all(torch.equal(a, b) for a, b in zip(expected, ours, strict=True))
    assert saved_bytes(model, checkpointing=True) < plain / 3
    assert not any("forward" in vars(module) for module in model.modules())  # nothing stays behind
    save_causal_lm(copy.deepcopy(model), tmp_path)
    assert torch.equal(forward(load_causal_lm(tmp_path)), out)


def test_an_architecture_without_such_layers_is_refused() -> None:
    backbone = HFBackbone(nn.Sequential(nn.Linear(2, 2)))
    backbone.activation_checkpointing = False
    with pytest.raises(ModelError, match="activation_checkpointing: expected layers.*Sequential, "
                                         "found none; set activation_checkpointing to false"):
        backbone.activation_checkpointing = True
