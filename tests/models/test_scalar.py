"""Reward models: round trips with transformers' sequence classification, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.errors import ModelError
from fastrl.models import (
    Decoder,
    PackedAttention,
    load_causal_lm,
    load_scalar_model,
    save_scalar_model,
    scalar_from_causal,
    sequence_scores,
)
from fastrl.models.folder import padding_id
from fastrl.models.hf import HFBackbone
from fastrl.packing import pack_sequences

NAMES = ("llama", "llama_tied", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "phi3", "opt")
SEQUENCES = [[5, 7, 96, 9, 33, 3, 8], [4, 95, 3], [11, 2], [17, 18, 19, 20, 21]]


def theirs(model) -> torch.Tensor:
    """Scores by transformers, one sequence at a time."""
    return torch.cat([model(input_ids=torch.tensor([s])).logits[0] for s in SEQUENCES])


def theirs_padded(model) -> torch.Tensor:
    """Scores by transformers of one right-padded batch."""
    width = max(map(len, SEQUENCES))
    pad = model.config.pad_token_id
    ids = torch.tensor([s + [pad] * (width - len(s)) for s in SEQUENCES])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in SEQUENCES])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_published_reward_models_load(name, checkpoint):
    made = checkpoint(name, "SequenceClassification", num_labels=1)
    model = load_scalar_model(made.folder)
    assert isinstance(model.backbone, HFBackbone if name in ("phi3", "opt") else Decoder)
    expected = theirs(made.model)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(sequence_scores(model, SEQUENCES, 10), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_saved_reward_model_loads_in_transformers(name, checkpoint, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = scalar_from_causal(load_causal_lm(checkpoint(name).folder), seed=0)
    model.head.bias.fill_(-1.25)
    save_scalar_model(model, tmp_path, max_shard_bytes=30_000)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert again.config.num_labels == 1
    assert again.config.fastrl_reward_bias == -1.25
    ours = sequence_scores(model, SEQUENCES, 100)
    # reward = transformers' logit + fastrl_reward_bias, padded or not
    torch.testing.assert_close(theirs(again) - 1.25, ours, rtol=0, atol=2e-5)
    torch.testing.assert_close(theirs_padded(again) - 1.25, ours, rtol=0, atol=2e-5)
    loaded = load_scalar_model(tmp_path)
    assert float(loaded.head.bias) == -1.25
    torch.testing.assert_close(sequence_scores(loaded, SEQUENCES, 100), ours, rtol=0, atol=1e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"][0].endswith("ForSequenceClassification")


@torch.no_grad()
def test_bias_reaches_every_token(checkpoint):
    model = scalar_from_causal(load_causal_lm(checkpoint("llama").folder), seed=0)
    batch = pack_sequences(SEQUENCES)
    attention = PackedAttention(batch.cu_seqlens, batch.max_seqlen)
    before = model(batch.token_ids, batch.positions, attention)
    model.head.bias.fill_(2.0)
    torch.testing.assert_close(model(batch.token_ids, batch.positions, attention), before + 2)
    assert before.dtype == torch.float32


def test_bias_stays_float32_in_bfloat16(checkpoint, tmp_path):
    model = scalar_from_causal(load_causal_lm(checkpoint("llama").folder, dtype="bfloat16"), 0)
    assert model.head.weight.dtype == torch.bfloat16
    model.head.bias.fill_(1.001)
    save_scalar_model(model, tmp_path)
    assert float(load_scalar_model(tmp_path, dtype="bfloat16").head.bias) == pytest.approx(1.001)


@torch.no_grad()
def test_bias_of_the_checkpoint_itself_is_folded_in(checkpoint, tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, Phi3ForSequenceClassification

    init = Phi3ForSequenceClassification.__init__

    def with_bias(self, config):
        init(self, config)
        self.score = torch.nn.Linear(config.hidden_size, config.num_labels, bias=True)

    made = checkpoint("phi3", "SequenceClassification", num_labels=1)
    folder = Path(shutil.copytree(made.folder, tmp_path / "biased"))
    tensors = load_file(folder / "model.safetensors") | {"score.bias": torch.tensor([0.75])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(Phi3ForSequenceClassification, "__init__", with_bias)
    model = load_scalar_model(folder)
    assert float(model.head.bias) == 0.75
    save_scalar_model(model, tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert float(again.score.bias) == 0
    assert again.config.fastrl_reward_bias == 0.75


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_language_model_is_not_a_reward_model(name, checkpoint):
    with pytest.raises(ModelError, match="expected a reward model .* scalar head.*ForCausalLM"):
        load_scalar_model(checkpoint(name).folder)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_classifier_is_not_a_reward_model(name, checkpoint):
    folder = checkpoint(name, "SequenceClassification", num_labels=3).folder
    with pytest.raises(ModelError, match="num_labels 1, got 3 labels"):
        load_scalar_model(folder)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_reward_model_without_its_head(name, checkpoint, tmp_path):
    made = checkpoint(name, "SequenceClassification", num_labels=1)
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    del tensors["score.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="score.weight"):
        load_scalar_model(folder)


def test_unreadable_bias(checkpoint, tmp_path):
    made = checkpoint("llama", "SequenceClassification", num_labels=1)
    folder = Path(shutil.copytree(made.folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text()) | {"fastrl_reward_bias": "high"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="fastrl_reward_bias: expected a number, got 'high'"):
        load_scalar_model(folder)


def test_padding_never_ends_a_text():
    assert padding_id(0, (2,), 1) == 0
    assert padding_id(2, (2,), 1) == 0
    assert padding_id(None, (0, 2), 1) == 3
