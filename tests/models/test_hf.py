"""Architectures that are not native: equal logits through fastrl's attention, or a reason."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastrl.errors import ModelError
from fastrl.models import PackedAttention, PagedAttention, load_causal_lm, save_causal_lm
from fastrl.models.hf import HFBackbone
from fastrl.packing import pack_sequences

SIZES = dict(vocab_size=97, hidden_size=40, intermediate_size=52, num_hidden_layers=2,
             num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=64, head_dim=8,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)


@pytest.fixture
def folder_of(tmp_path):
    """A folder with a random model of any transformers config class."""
    import transformers

    def make(name: str, **settings) -> Path:
        config = getattr(transformers, f"{name}Config")(**settings)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["phi3", "opt"])
@torch.no_grad()
def test_logits_equal_transformers_and_survive_saving(name, checkpoint, logits, tmp_path):
    made = checkpoint(name)
    model = load_causal_lm(made.folder)
    assert isinstance(model.backbone, HFBackbone)
    expected = logits.separate(made.model)
    torch.testing.assert_close(logits.packed(model), expected, rtol=0, atol=2e-5)
    save_causal_lm(model, tmp_path, max_shard_bytes=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(logits.separate(logits.reload(tmp_path)), expected, rtol=0,
                               atol=5e-6)
    assert "fastrl_attention" not in (tmp_path / "config.json").read_text()
    assert torch.equal(logits.packed(load_causal_lm(tmp_path)), logits.packed(model))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_window", "qwen3", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_native_families_by_both_roads(name, checkpoint, logits):
    folder = checkpoint(name).folder
    other = load_causal_lm(folder, implementation="transformers")
    native = load_causal_lm(folder)
    assert isinstance(other.backbone, HFBackbone)
    assert other.spec == native.spec
    torch.testing.assert_close(logits.packed(other), logits.packed(native), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name, settings", [
    ("Mixtral", SIZES | dict(num_local_experts=4, num_experts_per_tok=2)),
    ("Gemma3Text", SIZES | dict(sliding_window=3,
                                layer_types=["sliding_attention", "full_attention"])),
    ("Phi", SIZES),  # its LM head has a bias
])
@torch.no_grad()
def test_other_architectures(name, settings, folder_of, logits, tmp_path):
    folder = folder_of(name, **settings)
    model = load_causal_lm(folder)
    expected = logits.separate(logits.reload(folder))
    torch.testing.assert_close(logits.packed(model), expected, rtol=0, atol=2e-5)
    save_causal_lm(model, tmp_path / "again")
    torch.testing.assert_close(logits.separate(logits.reload(tmp_path / "again")), expected,
                               rtol=0, atol=5e-6)
    assert (model.lm_head.bias is not None) == (name == "Phi")


def test_gradients_and_copies(checkpoint, logits):
    model = load_causal_lm(checkpoint("opt").folder).train()
    assert not any(m.training for m in model.backbone.model.modules())  # its dropout stays off
    assert not hasattr(model.backbone, "residual_dropout")
    first = logits.packed(model)
    assert torch.equal(first, logits.packed(model))
    first.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    copied = copy.deepcopy(model)
    tied = model.backbone.model.get_input_embeddings().weight
    assert model.lm_head.weight is tied
    assert copied.lm_head.weight is copied.backbone.model.get_input_embeddings().weight
    assert copied.lm_head.weight is not tied


def test_wanted_rows_alone(checkpoint):
    model, batch = load_causal_lm(checkpoint("opt").folder), pack_sequences([[5, 7, 96], [9, 33]])
    wanted = torch.tensor([4, 2])
    hidden, some = (model(batch.token_ids, batch.positions,
                          PackedAttention.of(batch), outputs) for outputs in (None, wanted))
    assert torch.equal(some, hidden[wanted])


@torch.no_grad()
def test_pages_equal_packed(checkpoint, logits):
    model = load_causal_lm(checkpoint("phi3").folder)  # with a window of 3
    spec, sequence = model.spec, [5, 7, 96, 9, 33, 3]
    pages = torch.zeros(4, spec.num_layers, 2, 2, spec.num_kv_heads, spec.head_dim)
    table = torch.tensor([[3, 1, 2]])
    outs = []
    for begin, end in ((0, 4), (4, 5), (5, 6)):
        positions = torch.arange(begin, end)
        batch = pack_sequences([sequence[begin:end]])
        state = PagedAttention(pages, table, table[0, positions // 2] * 2 + positions % 2,
                               batch.cu_seqlens, torch.tensor([end]), end - begin, end)
        outs.append(model(batch.token_ids, positions, state))
    logits_of = torch.nn.functional.linear(torch.cat(outs), model.lm_head.weight)
    torch.testing.assert_close(logits_of, logits.packed(model, [sequence]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, settings, reason", [
    ("Gemma2", SIZES, "it caps attention scores .*it caps logits"),
    ("Cohere", {k: v for k, v in SIZES.items() if k != "head_dim"}, "it scales logits"),
    ("Granite", SIZES | dict(logits_scaling=8.0), "it scales logits"),
    ("Bloom", dict(vocab_size=97, hidden_size=40, n_layer=2, n_head=5), "no attention interface"),
    ("Mamba", dict(vocab_size=97, hidden_size=40, num_hidden_layers=2), "a recurrent state"),
    ("GptOss", SIZES | dict(num_local_experts=4, num_experts_per_tok=2), "attention sinks"),
    ("Llama4Text", SIZES | dict(attention_chunk_size=4, num_local_experts=2,
                                intermediate_size_mlp=32), "it attends in chunks"),
    ("Nemotron", {k: v for k, v in SIZES.items() if k != "head_dim"}, "does not hand them on"),
    ("Bert", dict(vocab_size=97, hidden_size=40, num_hidden_layers=2, num_attention_heads=5,
                  intermediate_size=52, is_decoder=True), "its logits differ from transformers'"),
])
def test_refused_with_the_reason(name, settings, reason, folder_of):
    with pytest.raises(ModelError, match=reason):
        load_causal_lm(folder_of(name, **settings))


def test_encoder_decoder_is_refused(tmp_path, checkpoint):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 97}))
    with pytest.raises(ModelError, match="AutoModelForCausalLM, got t5"):
        load_causal_lm(tmp_path)


def test_window_that_no_layer_asks_for_is_refused(tmp_path, checkpoint, monkeypatch):
    from fastrl.models import hf

    def forgetful(*args, **kwargs):
        return attention(*args, **kwargs | {"sliding_window": None})

    folder = Path(shutil.copytree(checkpoint("phi3").folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 30}))
    load_causal_lm(folder)
    attention = hf.fastrl_attention
    monkeypatch.setattr(hf, "fastrl_attention", forgetful)
    with pytest.raises(ModelError, match="3 attention calls with 1 shapes and 0 windows"):
        load_causal_lm(folder)


def test_code_in_a_checkpoint_never_runs(tmp_path, checkpoint):
    folder = Path(shutil.copytree(checkpoint("phi3").folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    hostile = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
               "_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/k",
               "attn_implementation": "evil/kernel"}
    (folder / "config.json").write_text(json.dumps(config | hostile))
    model = load_causal_lm(folder)
    assert model.backbone.model.config._attn_implementation == "fastrl_attention"
    (folder / "config.json").write_text(json.dumps(config | hostile | {"model_type": "evil"}))
    with pytest.raises(ModelError, match="got model_type 'evil'.*never run") as error:
        load_causal_lm(folder)
    assert len(str(error.value)) < 400  # not the names of all architectures there are


def test_weights_that_do_not_fit(tmp_path, checkpoint):
    from safetensors.torch import save_file

    folder = Path(shutil.copytree(checkpoint("phi3").folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    missing = dict(tensors)
    del missing["model.layers.1.mlp.down_proj.weight"]
    save_file(missing, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing model.layers.1.mlp.down_proj.weight"):
        load_causal_lm(folder)
    save_file(tensors | {"model.surprise": torch.zeros(1)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ModelError, match="unexpected model.surprise"):
        load_causal_lm(folder)
    save_file(tensors | {"model.norm.weight": torch.zeros(7)}, folder / "model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ModelError, match="transformers could not load this folder"):
        load_causal_lm(folder)
