"""Hugging Face folders: equal logits, round trips, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl.errors import ModelError
from fastrl.models import (
    Decoder,
    decoder_config,
    load_causal_lm,
    new_decoder,
    save_causal_lm,
)
from fastrl.models.config import DecoderConfig
from fastrl.models.hf import HFBackbone

NATIVE = ("llama", "llama_tied", "llama_linear", "llama_llama3", "mistral", "mistral_full",
          "qwen2", "qwen2_window", "qwen3", "gpt2", "gpt2_untied", "gpt_neox", "gpt_neox_serial")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A private copy of a checkpoint's folder, to be damaged."""
    def copy(name: str, head: str = "CausalLM") -> Path:
        return Path(shutil.copytree(checkpoint(name, head).folder, tmp_path / "model"))
    return copy


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_logits_equal_transformers(name, checkpoint, logits):
    made = checkpoint(name)
    model = load_causal_lm(made.folder, implementation="native")
    assert isinstance(model.backbone, Decoder)
    expected = logits.separate(made.model)
    assert expected.abs().max() > 2  # weights are large enough for a mistake to show
    torch.testing.assert_close(logits.packed(model), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NATIVE)
@torch.no_grad()
def test_saved_folder_loads_in_transformers_with_the_same_logits(
    name, checkpoint, logits, tmp_path
):
    made = checkpoint(name)
    save_causal_lm(load_causal_lm(made.folder), tmp_path)
    again = logits.reload(tmp_path)
    torch.testing.assert_close(logits.separate(again), logits.separate(made.model),
                               rtol=0, atol=5e-6)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(made.model).__name__]
    assert config["eos_token_id"] == 2
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    saved, original = (load_file(d / "model.safetensors") for d in (tmp_path, made.folder))
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[key], original[key]) for key in saved)


@torch.no_grad()
def test_stories260k_known_values(shared, logits):
    model = load_causal_lm(shared / "models" / "stories260k")
    assert isinstance(model.backbone, Decoder)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(shared / "models" / "stories260k" / "tokenizer.json"))
    ids = tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to "
                           "play outside in the park. One day, she saw a big, red ball.").ids
    assert ids[:16] == [1, 403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317,
                        426]
    out = logits.packed(model, [ids])
    loss = torch.nn.functional.cross_entropy(out[:-1], torch.tensor(ids[1:]))
    assert float(loss) == pytest.approx(0.3241, abs=5e-5)
    reference = logits.separate(logits.reload(shared / "models" / "stories260k"), [ids])
    torch.testing.assert_close(out, reference, rtol=0, atol=1e-4)
    assert model.spec.eos_token_ids == (2,)
    assert model.spec.vocab_size == 512


@torch.no_grad()
def test_shards_are_written_and_read(checkpoint, logits, tmp_path):
    made = checkpoint("qwen3")
    model = load_causal_lm(made.folder)
    save_causal_lm(model, tmp_path)
    save_causal_lm(model, tmp_path, max_shard_bytes=20_000)
    assert not (tmp_path / "model.safetensors").exists()  # no weights of an earlier save
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {p.name for p in shards} == set(index["weight_map"].values())
    assert max(sum(t.numel() * 4 for t in load_file(p).values()) for p in shards) <= 20_000
    again = load_causal_lm(tmp_path)
    assert torch.equal(logits.packed(again), logits.packed(model))
    expected = logits.separate(made.model)
    torch.testing.assert_close(logits.separate(logits.reload(tmp_path)), expected, rtol=0,
                               atol=5e-6)
    save_causal_lm(again, tmp_path)
    assert not list(tmp_path.glob("model-*"))
    assert not (tmp_path / "model.safetensors.index.json").exists()


@torch.no_grad()
def test_transformers_own_shards_are_read(checkpoint, logits, tmp_path):
    made = checkpoint("llama")
    made.model.save_pretrained(tmp_path, max_shard_size=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    torch.testing.assert_close(logits.packed(load_causal_lm(tmp_path)),
                               logits.separate(made.model), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_bfloat16(name, checkpoint, logits, tmp_path):
    from transformers import AutoModelForCausalLM

    model = load_causal_lm(checkpoint(name).folder, dtype="bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    save_causal_lm(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours, expected = logits.packed(model).float(), logits.separate(theirs).float()
    exact = logits.packed(load_causal_lm(tmp_path))
    # Both are roundings of the same numbers: ours may not be worse than twice theirs.
    assert (ours - exact).abs().mean() < 2 * (expected - exact).abs().mean()
    # A bfloat16 file read as float32 holds the same values.
    assert torch.equal(load_causal_lm(tmp_path).lm_head.weight, model.lm_head.weight.float())


def test_tied_weights_are_one_parameter_and_one_tensor(checkpoint, tmp_path):
    model = load_causal_lm(checkpoint("llama_tied").folder)
    assert model.lm_head.weight is model.backbone.embed.weight
    save_causal_lm(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


@torch.no_grad()
def test_head_that_differs_from_the_embedding_is_not_tied(copied, logits):
    folder = copied("llama_tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_causal_lm(folder)
    assert model.lm_head.weight is not model.backbone.embed.weight
    torch.testing.assert_close(logits.packed(model), logits.separate(logits.reload(folder)),
                               rtol=0, atol=2e-5)


def test_names_of_older_checkpoints(copied, logits):
    """gpt2 without prefix and with stored causal masks, as published."""
    folder = copied("gpt2")
    expected = logits.packed(load_causal_lm(folder))
    tensors = {name.removeprefix("transformer."): t
               for name, t in load_file(folder / "model.safetensors").items()}
    tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.0.attn.masked_bias": torch.ones(1)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits.packed(load_causal_lm(folder)), expected)


def test_gpt_neox_reads_both_names_of_its_head(copied, logits):
    folder = copied("gpt_neox")
    expected = logits.packed(load_causal_lm(folder))
    tensors = load_file(folder / "model.safetensors")
    assert "embed_out.weight" in tensors
    tensors["lm_head.weight"] = tensors.pop("embed_out.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits.packed(load_causal_lm(folder)), expected)


def test_end_of_text_ids_come_from_the_generation_config(copied, tmp_path):
    folder = copied("llama")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 9])
    model = load_causal_lm(folder)
    assert model.spec.eos_token_ids == (2, 9)
    save_causal_lm(model, tmp_path / "again")
    assert load_causal_lm(tmp_path / "again").spec.eos_token_ids == (2, 9)


def test_tokenizer_files_are_copied_byte_by_byte(checkpoint, tmp_path):
    model, source = load_causal_lm(checkpoint("llama").folder), tmp_path / "source"
    source.mkdir()
    files = {"tokenizer.json": b'{"a":\r\n 1}', "chat_template.jinja": "{{ é }}".encode()}
    for name, content in (files | {"secret.txt": b"no"}).items():
        (source / name).write_bytes(content)
    save_causal_lm(model, tmp_path / "out", tokenizer_from=source)
    assert {n: (tmp_path / "out" / n).read_bytes() for n in files} == files
    assert not (tmp_path / "out" / "secret.txt").exists()

    class Encoder:
        def save(self, path):
            (Path(path) / "tokenizer.json").write_text("mine")

    save_causal_lm(model, tmp_path / "out", tokenizer_from=Encoder())
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="expected tokenizer files"):
        save_causal_lm(model, tmp_path / "out", tokenizer_from=tmp_path / "empty")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_new_decoders_save_and_load(family, logits, tmp_path):
    config = decoder_config(family, vocab_size=51, hidden_size=24, num_layers=2, num_heads=3,
                            max_positions=32, eos_token_ids=(2,), bos_token_id=1)
    assert config.intermediate_size == 64
    model = new_decoder(config, seed=0)
    save_causal_lm(model, tmp_path)
    again = load_causal_lm(tmp_path)
    assert again.spec == model.spec
    assert again.backbone.config == config
    sequences = [[1, 5, 50], [7, 8]]
    expected = logits.packed(model, sequences)
    assert torch.equal(logits.packed(again, sequences), expected)
    torch.testing.assert_close(logits.separate(logits.reload(tmp_path), sequences), expected,
                               rtol=0, atol=1e-5)


def test_no_folder(tmp_path):
    with pytest.raises(ModelError, match="expected a model folder, found none"):
        load_causal_lm(tmp_path / "absent")


def test_no_config(tmp_path):
    with pytest.raises(ModelError, match="config.json, found none"):
        load_causal_lm(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_broken_config(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match="expected a JSON"):
        load_causal_lm(tmp_path)


def test_no_weights(copied):
    folder = copied("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="expected weights .*found none"):
        load_causal_lm(folder)


@pytest.mark.parametrize("name", ["llama", "opt"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused(name, file, copied):
    folder = copied(name)
    (folder / "model.safetensors").rename(folder / file)
    with pytest.raises(ModelError, match=f"got {file}; such files can run code.*save_pretrained"):
        load_causal_lm(folder)


def test_truncated_weights(copied):
    folder = copied("llama")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ModelError, match="expected a safetensors file"):
        load_causal_lm(folder)


def test_missing_shard_and_path_outside_the_folder(copied, checkpoint):
    folder = copied("llama")
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = folder / "model.safetensors.index.json"
    for file in ("model-00001-of-00002.safetensors", "../elsewhere.safetensors"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
        with pytest.raises(ModelError, match="names the shard"):
            load_causal_lm(folder)
    index.write_text("{}")
    with pytest.raises(ModelError, match="weight_map"):
        load_causal_lm(folder)


def test_names_and_shapes_that_do_not_fit_are_listed(copied):
    folder = copied("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(51, 40)
    tensors["model.surprise"] = torch.zeros(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_causal_lm(folder)
    for part in ("3 differences", "missing model.layers.1.self_attn.k_proj.weight",
                 "unexpected model.surprise",
                 "model.layers.0.mlp.gate_proj.weight has shape [51, 40], expected [52, 40]"):
        assert part in str(error.value)


@pytest.mark.parametrize(("size", "expected"), [
    (2**26, "expected \\[67108864, 40\\]"),
    (10**12, "intermediate_size: expected a whole number from 1 to 67,108,864, got 1000000000000"),
])
def test_huge_config_is_refused_before_memory_is_taken(copied, size, expected):
    folder = copied("llama")
    edit_json(folder / "config.json", intermediate_size=size)
    with pytest.raises(ModelError, match=expected):
        load_causal_lm(folder)


def test_reward_model_is_not_a_language_model(checkpoint):
    folder = checkpoint("llama", "SequenceClassification", num_labels=1).folder
    with pytest.raises(ModelError, match="which has no LM head"):
        load_causal_lm(folder)


def test_quantised_weights_are_refused(copied):
    folder = copied("llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match="quantised"):
        load_causal_lm(folder)


def test_dtype_and_implementation_names(checkpoint):
    with pytest.raises(ModelError, match="dtype: expected one of float32, bfloat16"):
        load_causal_lm(checkpoint("llama").folder, dtype="int8")
    with pytest.raises(ModelError, match="implementation: expected auto"):
        load_causal_lm(checkpoint("llama").folder, implementation="vllm")


@torch.no_grad()
def test_auto_goes_to_transformers_where_native_cannot(copied, logits):
    folder = copied("llama")
    edit_json(folder / "config.json", rope_parameters={
        "rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0,
        "original_max_position_embeddings": 16})
    model = load_causal_lm(folder)
    assert isinstance(model.backbone, HFBackbone)
    torch.testing.assert_close(logits.packed(model), logits.separate(logits.reload(folder)),
                               rtol=0, atol=2e-5)
    with pytest.raises(ModelError, match="rope_type 'yarn' is not default, linear or llama3"):
        load_causal_lm(folder, implementation="native")


def test_config_without_words_for_a_switch_is_not_saved(tmp_path):
    config = DecoderConfig(
        family="mistral", vocab_size=11, hidden_size=8, intermediate_size=16, num_layers=1,
        num_heads=2, num_kv_heads=2, head_dim=4, max_positions=16, rotary_dim=4, qkv_bias=True)
    with pytest.raises(ModelError, match="mistral checkpoint cannot describe"):
        save_causal_lm(new_decoder(config, 0), tmp_path)
