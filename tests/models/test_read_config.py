"""config.json of the native families: defaults, older spellings, and values that are refused."""

import pytest

from fastrl.errors import ModelError
from fastrl.models.read_config import NotNativeError, read_config

BASE = {"model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GPT2 = {"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 4,
        "n_positions": 64}


def test_defaults_are_those_of_transformers():
    config = read_config(BASE)
    assert (config.num_kv_heads, config.head_dim, config.rotary_dim) == (4, 4, 4)
    assert (config.rotary_base, config.norm_epsilon, config.tie_embeddings) == (1e4, 1e-6, False)
    assert read_config(BASE | {"model_type": "mistral"}).windows == (4096, 4096)
    assert read_config(BASE | {"model_type": "mistral", "sliding_window": None}).windows is None
    assert read_config(BASE | {"model_type": "qwen3"}).head_dim == 128
    assert read_config(BASE | {"model_type": "qwen2"}).qkv_bias
    neox = read_config(BASE | {"model_type": "gpt_neox", "hidden_size": 32})
    assert (neox.rotary_dim, neox.parallel_residual, neox.activation) == (2, True, "gelu")
    gpt2 = read_config(GPT2)
    assert (gpt2.intermediate_size, gpt2.activation, gpt2.tie_embeddings) == (64, "gelu_new", True)


def test_older_rotary_spellings():
    old = read_config(BASE | {"rope_theta": 500.0, "rope_scaling": {"type": "linear",
                                                                    "factor": 2.0}})
    new = read_config(BASE | {"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear",
                                                  "factor": 2.0}})
    assert old == new
    assert old.rotary_base == 500.0
    assert old.rotary_scaling.factor == 2.0
    neox = BASE | {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 500}
    assert (read_config(neox).rotary_dim, read_config(neox).rotary_base) == (2, 500.0)


def test_layer_types():
    qwen = BASE | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
    assert read_config(qwen | {"max_window_layers": 1}).windows == (None, 8)
    assert read_config(qwen | {"max_window_layers": 2}).windows is None
    types = ["sliding_attention", "full_attention"]
    assert read_config(qwen | {"layer_types": types}).windows == (8, None)
    assert read_config(qwen | {"layer_types": types, "use_sliding_window": False}).windows is None


def test_keys_outside_the_list_change_nothing():
    hostile = {"_attn_implementation": "evil/kernel", "_attn_implementation_internal": "evil/k",
               "auto_map": {"AutoModel": "evil.Model"}, "attn_logit_softcapping": 3.0}
    assert read_config(BASE | hostile) == read_config(BASE)


@pytest.mark.parametrize("raw, reason", [
    (BASE | {"model_type": "phi3"}, "model_type 'phi3' is not one of llama"),
    ({}, "model_type None is not one of"),
    (BASE | {"hidden_act": "xielu"}, "hidden_act 'xielu' is not one of silu"),
    (BASE | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    (BASE | {"rope_parameters": {"full_attention": {}}}, "rope_parameters is not one setting"),
    (BASE | {"partial_rotary_factor": 0.75}, "3 rotary channels"),
    (BASE | {"model_type": "qwen2", "use_sliding_window": True,
             "layer_types": ["chunked_attention"] * 2}, "layer_types are not 2 of"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
    (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights is false"),
    (GPT2 | {"add_cross_attention": True}, "add_cross_attention is true"),
])
def test_what_the_native_decoder_does_not_compute(raw, reason):
    with pytest.raises(NotNativeError, match=reason):
        read_config(raw)


@pytest.mark.parametrize("key, value, expected", [
    ("hidden_size", None, "a whole number"), ("num_hidden_layers", 0, "at least 1"),
    ("vocab_size", "32", "a whole number"), ("num_attention_heads", 2.5, "a whole number"),
    ("rms_norm_eps", "x", "a number"), ("tie_word_embeddings", "yes", "true or false"),
    ("eos_token_id", "</s>", "a token id or a list"), ("num_key_value_heads", 3, "a divisor"),
    ("rope_theta", True, "a number"), ("vocab_size", True, "a whole number"),
])
def test_impossible_values_name_the_key(key, value, expected):
    with pytest.raises(ModelError, match=expected) as error:
        read_config(BASE | {key: value})
    assert key.replace("num_key_value_heads", "num_kv_heads") in str(error.value)
    assert not isinstance(error.value, NotNativeError)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_no_value_of_any_key_escapes_as_another_error(family):
    keys = {*BASE, *GPT2, "head_dim", "hidden_act", "activation_function", "rope_scaling",
            "rope_parameters", "rope_theta", "partial_rotary_factor", "rotary_pct", "layer_types",
            "rotary_emb_base", "sliding_window", "use_sliding_window", "max_window_layers",
            "eos_token_id", "pad_token_id", "layer_norm_eps", "attention_bias", "n_inner"}
    values = (None, True, -1, 0, 7, 2.5, float("nan"), "x", [], [1], ["x"], [[]], {}, {"x": 1},
              {"rope_type": []}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": "x"})
    whole = BASE | GPT2 | {"model_type": family, "use_sliding_window": True}
    for key in keys - {"model_type"}:
        for value in values:
            try:
                read_config(whole | {key: value})
            except ModelError:
                continue
