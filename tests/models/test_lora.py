"""LoRA: peft is the oracle; adapters off are the frozen model; what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config import SFTConfig
from fastrl.errors import ConfigError, ModelError
from fastrl.models import (
    CausalLM,
    PackedAttention,
    ScalarModel,
    load_causal_lm,
    load_scalar_model,
    save_causal_lm,
    save_scalar_model,
    scalar_from_causal,
)
from fastrl.models.lora import LoRALinear, adapt, trained_parameters, without_adapters
from fastrl.packing import pack_sequences

FAMILIES = ("llama", "llama_tied", "qwen3", "gpt2", "gpt_neox")
EVERY_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                "lm_head")


def settings(rank: int = 3, **changes: Any) -> SFTConfig:
    return SFTConfig(lora_rank=rank, lora_alpha=5.0, **changes)


@torch.no_grad()
def randomize(model: CausalLM | ScalarModel) -> None:
    """Adapters as after training: B is not 0, and every number is another one."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(model):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def adapted(folder: Path, **changes: Any) -> CausalLM:
    model = load_causal_lm(folder)
    adapt(model, settings(**changes))
    return model


@pytest.mark.parametrize(("name", "targets"), [
    *((name, None) for name in FAMILIES), ("llama", EVERY_TARGET),
    ("llama", ("v_proj", "gate_proj")), ("llama_tied", ("lm_head",)), ("opt", None),
    ("opt", ("q_proj", "fc2"))])
@pytest.mark.filterwarnings("ignore")  # peft warns of tied heads and of its own imports
@torch.no_grad()
def test_an_adapter_folder_gives_the_same_logits_in_peft_and_merged(
    name: str, targets: tuple[str, ...] | None, checkpoint: Any, logits: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the oracle of adapter files")
    made = checkpoint(name)
    model = adapted(made.folder, lora_targets=targets)
    plain = logits.packed(load_causal_lm(made.folder))
    assert torch.equal(logits.packed(model), plain)  # B is 0
    randomize(model)
    ours = logits.packed(model)
    assert (ours - plain).abs().max() > 0.5
    save_causal_lm(model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]
    theirs = peft.PeftModel.from_pretrained(logits.reload(made.folder), tmp_path).eval()
    expected = logits.separate(theirs)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    merged = load_causal_lm(tmp_path)
    assert merged.adapters is None and len(trained_parameters(merged)) > 3
    torch.testing.assert_close(logits.packed(merged), expected, rtol=0, atol=1e-4)
    # Over the adapters, and then over the plain model: nothing of an earlier save is left.
    save_causal_lm(merged, tmp_path)
    again = logits.packed(load_causal_lm(tmp_path))
    assert torch.equal(again, logits.packed(merged)) and (tmp_path / "config.json").exists()
    assert not (tmp_path / "adapter_config.json").exists()
    save_causal_lm(model, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "adapter_model.safetensors"] and not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(("name", "changes"), [
    ("llama", {"use_rslora": True}), ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    ("gpt_neox", {"target_modules": ["query_key_value"]}), ("opt", {})])
@pytest.mark.filterwarnings("ignore")  # peft on its own imports
@torch.no_grad()
def test_adapters_that_peft_saved_are_merged(
    name: str, changes: dict[str, Any], checkpoint: Any, logits: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the oracle of adapter files")
    made = checkpoint(name)
    config = peft.LoraConfig(**({"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"],
                                 "task_type": "CAUSAL_LM"} | changes))
    theirs = peft.get_peft_model(logits.reload(made.folder), config).eval()
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in theirs.named_parameters():
        if ".lora_" in parameter_name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    theirs.save_pretrained(tmp_path)
    merged = logits.packed(load_causal_lm(tmp_path))
    assert (merged - logits.packed(load_causal_lm(made.folder))).abs().max() > 0.1
    torch.testing.assert_close(merged, logits.separate(theirs), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # transformers makes a new head, peft then loads ours
@torch.no_grad()
def test_a_reward_models_adapters_load_in_peft(
    checkpoint: Any, logits: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="needs peft, the oracle of adapter files")
    from transformers import AutoModelForSequenceClassification

    made = checkpoint("llama")
    model = scalar_from_causal(load_causal_lm(made.folder), seed=3)
    adapt(model, settings())
    randomize(model)
    model.head.bias.fill_(0.75)
    save_scalar_model(model, tmp_path)
    full = AutoModelForSequenceClassification.from_pretrained(made.folder, num_labels=1)
    theirs = peft.PeftModel.from_pretrained(full, tmp_path).eval()
    tokens = torch.tensor([[5, 7, 96, 9]])
    batch = pack_sequences(tokens.tolist())
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
    for ours in (model, load_scalar_model(tmp_path)):
        values = ours(batch.token_ids, batch.positions, attention)
        torch.testing.assert_close(values[-1] - 0.75, theirs(tokens).logits[0, 0], rtol=0,
                                   atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_the_same_seed_gives_the_same_adapters(name: str, checkpoint: Any) -> None:
    if name == "opt":
        pytest.importorskip("peft", reason="needs peft for models through transformers")
    state = torch.get_rng_state()
    one, same, other = (adapted(checkpoint(name).folder, seed=seed) for seed in (4, 4, 5))
    first, again, others = (
        [p for name, p in model.named_parameters() if ".lora_a." in name.lower()]
        for model in (one, same, other))
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, others))
    assert torch.equal(state, torch.get_rng_state())
    bound = 40 ** -0.5  # of A behind 40 inputs
    largest = max(float(p.detach().abs().max()) for p in first if p.shape[1] == 40)
    assert 0.95 * bound < largest <= bound


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_adapters_off_are_the_base_to_the_bit(name: str, checkpoint: Any, logits: Any) -> None:
    if name == "opt":
        pytest.importorskip("peft", reason="needs peft for models through transformers")
    folder = checkpoint(name).folder
    plain = load_causal_lm(folder)
    model = adapted(folder, lora_targets=EVERY_TARGET if name == "llama" else None)
    randomize(model)
    off = without_adapters(model)
    assert torch.equal(logits.packed(off), logits.packed(plain))
    assert not torch.equal(logits.packed(model), logits.packed(plain))
    held = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in off.parameters()} <= held
    assert len(list(off.parameters())) == len(list(plain.parameters()))


@torch.no_grad()
def test_adapters_of_bf16_weights_are_bf16_and_merge_with_one_rounding(
    checkpoint: Any, tmp_path: Path
) -> None:
    folder = checkpoint("llama").folder
    model = load_causal_lm(folder, "bfloat16")
    adapt(model, settings(lora_targets=("o_proj",)))
    randomize(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    module = model.backbone.layers[1].attention.out
    assert isinstance(module, LoRALinear)
    expected = (module.weight.float() + 5 / 3 * (
        module.lora_b[0].weight.float() @ module.lora_a.weight.float())).bfloat16()
    save_causal_lm(model, tmp_path)
    merged = load_causal_lm(tmp_path, "bfloat16").backbone.layers[1].attention.out.weight
    assert torch.equal(merged, expected)


def test_without_peft_other_architectures_are_refused(
    checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("opt").folder
    monkeypatch.setitem(sys.modules, "peft", None)
    model = load_causal_lm(folder)
    with pytest.raises(ModelError, match="expected peft for opt, .* pip install peft"):
        adapt(model, settings())
    assert model.adapters is None and all(p.requires_grad for p in model.parameters())


def test_adapters_of_another_rank_or_of_a_reward_model_are_refused(
    checkpoint: Any, tmp_path: Path
) -> None:
    made = checkpoint("llama")
    save_causal_lm(adapted(made.folder), tmp_path / "policy")
    reward = scalar_from_causal(load_causal_lm(made.folder), seed=3)
    adapt(reward, settings())
    save_scalar_model(reward, tmp_path / "reward")
    with pytest.raises(ModelError, match="adapters of a language model, got a reward model's"):
        load_causal_lm(tmp_path / "reward")
    path = tmp_path / "policy" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": config["r"] + 1}))
    with pytest.raises(ModelError, match=f"rank {config['r'] + 1}, as r in adapter_config.json"):
        load_causal_lm(tmp_path / "policy")



@pytest.mark.parametrize(("name", "targets", "message"), [
    ("llama", ("q",), "out of q_proj, k_proj, .*, lm_head, got q; change"),
    ("gpt2", ("q_proj",), "out of c_attn, c_proj, c_fc, lm_head, got q_proj"),
    ("llama", (), "got none"), ("opt", ("lm_head",), "got lm_head")])
def test_unknown_targets_are_refused(
    name: str, targets: tuple[str, ...], message: str, checkpoint: Any
) -> None:
    if name == "opt":
        pytest.importorskip("peft", reason="needs peft for models through transformers")
    with pytest.raises(ConfigError, match=message):
        adapted(checkpoint(name).folder, lora_targets=targets)
