"""A DecoderConfig as the keys of its family's config.json."""

from typing import Any

from fastrl.errors import ModelError
from fastrl.models.config import DecoderConfig
from fastrl.models.read_config import read_config


def _write_rotary(config: DecoderConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rotary_dim != config.head_dim:
        values["partial_rotary_factor"] = config.rotary_dim / config.head_dim
    scaling = config.rotary_scaling
    if scaling is not None:
        values |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        values |= {"low_freq_factor": scaling.low_freq_factor,
                   "high_freq_factor": scaling.high_freq_factor,
                   "original_max_position_embeddings": scaling.original_max_positions}
    return values


def _write_windows(config: DecoderConfig) -> dict[str, Any]:
    windows = config.windows or (None,) * config.num_layers
    width = next((w for w in windows if w is not None), None)
    if config.family == "mistral":
        return {"sliding_window": width}
    if config.family not in ("qwen2", "qwen3"):
        return {}
    return {
        "use_sliding_window": width is not None, "sliding_window": width,
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
    }


def _write_rotary_family(config: DecoderConfig) -> dict[str, Any]:
    """Keys of llama, mistral, qwen2, qwen3 and gpt_neox."""
    values: dict[str, Any] = {
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions, "hidden_act": config.activation,
        "rope_parameters": _write_rotary(config),
    }
    if config.family in ("llama", "qwen3", "gpt_neox"):
        values["attention_bias"] = config.qkv_bias
    if config.family == "gpt_neox":
        # Both spellings: transformers 4 reads the older one.
        return values | {
            "layer_norm_eps": config.norm_epsilon, "rotary_emb_base": config.rotary_base,
            "rotary_pct": config.rotary_dim / config.head_dim, "hidden_dropout": 0.0,
            "use_parallel_residual": config.parallel_residual,
        }
    values |= {"num_key_value_heads": config.num_kv_heads, "rms_norm_eps": config.norm_epsilon,
               "head_dim": config.head_dim, "rope_theta": config.rotary_base}
    if config.family == "llama":
        values["mlp_bias"] = config.mlp_bias
    return values | _write_windows(config)


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.intermediate_size, "n_positions": config.max_positions,
        "activation_function": config.activation, "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """The keys of config.json that describe a decoder; `read_config` gives it back.

    Raises:
        ModelError: when the family has no words for a switch of the config.
    """
    eos = list(config.eos_token_ids)
    values = {
        "model_type": config.family, "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range, "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else eos,
        "pad_token_id": config.pad_token_id, "use_cache": True,
        **(_write_gpt2(config) if config.family == "gpt2" else _write_rotary_family(config)),
    }
    if read_config(values) != config:
        raise ModelError(
            f"a {config.family} checkpoint cannot describe this decoder: expected the switches "
            f"of {read_config(values)}, got {config}; make it with decoder_config"
        )
    return values
