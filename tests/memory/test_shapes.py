"""Shapes from files: config.json and headers, never the weights."""

import json
from pathlib import Path

import pytest
import torch

from fastrl.errors import ModelError
from fastrl.memory.shapes import shape_named, shape_of_folder, shape_of_model
from fastrl.models import load_causal_lm, new_decoder, save_causal_lm, scalar_from_causal
from fastrl.models.families import decoder_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_folder_and_model_agree(family: str, tied: bool, tmp_path: Path) -> None:
    config = decoder_config(family, vocab_size=61, hidden_size=64, num_layers=2, num_heads=4,  # type: ignore[arg-type]
                            max_positions=32, tie_embeddings=tied)
    model = new_decoder(config, 0)
    save_causal_lm(model, tmp_path)
    shape = shape_of_folder(tmp_path)
    assert sorted(shape.language_model) == sorted(p.numel() for p in model.parameters())
    assert sorted(shape.language_model) == sorted(shape_of_model("policy", model).language_model)
    scalar = scalar_from_causal(model, 0)
    assert sorted(shape.scalar_model) == sorted(p.numel() for p in scalar.parameters())
    assert sorted(shape_of_model("critic", scalar).scalar_model) == sorted(shape.scalar_model)


def test_the_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_causal_lm(new_decoder(decoder_config(
        "llama", vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, max_positions=32), 0),
        tmp_path)
    monkeypatch.setattr("fastrl.models.folder.WeightFiles.read", lambda *_: pytest.fail("read"))
    assert shape_of_folder(tmp_path).decoder.hidden_size == 64


def test_files_that_are_too_small_are_refused(tmp_path: Path) -> None:
    save_causal_lm(new_decoder(decoder_config(
        "llama", vocab_size=61, hidden_size=64, num_layers=1, num_heads=4, max_positions=32), 0),
        tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 9}))
    with pytest.raises(ModelError, match="download may be incomplete"):
        shape_of_folder(tmp_path)


def test_other_architectures_count_what_their_files_hold(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, ffn_dim=48,
                                    num_attention_heads=4, max_position_embeddings=32,
                                    word_embed_proj_dim=32)
    torch.manual_seed(0)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path)
    shape, model = shape_of_folder(tmp_path), load_causal_lm(tmp_path)
    assert sum(shape.language_model) == sum(p.numel() for p in model.parameters())
    assert shape.decoder.num_layers == 2 and shape.decoder.head_dim == 8


def test_a_wrong_name_names_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"llama-3\.1-8b"):
        shape_named("llama-3.1-8")
