"""LoRA: peft is the oracle; adapters off are the frozen model; what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config import SFTConfig
from fastrl.models import CausalLM, load_causal_lm, save_causal_lm
from fastrl.models.lora import adapt, trained_parameters

FAMILIES = ("llama", "llama_tied", "qwen3", "gpt2", "gpt_neox")
EVERY_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
                "lm_head")


def settings(rank: int = 3, **changes: Any) -> SFTConfig:
    return SFTConfig(lora_rank=rank, lora_alpha=5.0, **changes)


@torch.no_grad()
def randomize(model: CausalLM) -> None:
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
