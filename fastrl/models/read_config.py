"""config.json of the native families into a DecoderConfig.

Only the keys named here are read; every other key of a downloaded config.json is ignored.
"""

import math
from collections.abc import Mapping
from typing import Any

from fastrl.errors import ModelError
from fastrl.models.config import ACTIVATION_NAMES, DecoderConfig, FamilyName, RotaryScaling

Json = Mapping[str, Any]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox")
ROTARY_KEYS = ("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings", "partial_rotary_factor")


class NotNativeError(ModelError):
    """The native decoder does not compute what a config.json asks for; transformers may."""


def _int(raw: Json, key: str, default: int | None = None, least: int = 1) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelError(f"config.json: {key}: expected a whole number of at least {least}, got "
                         f"{value!r}; correct the file")
    return value


def _float(raw: Json, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ModelError(f"config.json: {key}: expected a number of at least 0, got {value!r}; "
                         "correct the file")
    return float(value)


def _bool(raw: Json, key: str, default: bool) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ModelError(f"config.json: {key}: expected true or false, got {value!r}; correct "
                         "the file")
    return value


def token_ids(raw: Json, key: str) -> tuple[int, ...]:
    """One token id, a list of them or null, as a tuple.

    Raises:
        ModelError: for anything else.
    """
    value = raw.get(key)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise ModelError(f"config.json: {key}: expected a token id or a list of them, got "
                         f"{value!r}; correct the file")
    # Older checkpoints write -1 for "none".
    return tuple(v for v in values if v >= 0)


def _first_id(raw: Json, key: str) -> int | None:
    return next(iter(token_ids(raw, key)), None)


def _activation(raw: Json, key: str, default: str) -> str:
    name = raw.get(key) or default
    if name not in ACTIVATION_NAMES:
        raise NotNativeError(f"{key} {name!r} is not one of {', '.join(ACTIVATION_NAMES)}")
    return str(name)


def _common(raw: Json, family: FamilyName) -> dict[str, Any]:
    """Fields that all families spell alike."""
    return {
        "family": family, "vocab_size": _int(raw, "vocab_size"),
        "initializer_range": _float(raw, "initializer_range", 0.02),
        "bos_token_id": _first_id(raw, "bos_token_id"),
        "eos_token_ids": token_ids(raw, "eos_token_id"),
        "pad_token_id": _first_id(raw, "pad_token_id"),
    }


def _rotary(raw: Json, head_dim: int, max_positions: int) -> dict[str, Any]:
    """Rotary fields, from either generation of transformers' keys."""
    values: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        nested = raw.get(key) or {}
        if not isinstance(nested, Mapping) or any(isinstance(v, Mapping) for v in nested.values()):
            raise NotNativeError(f"{key} is not one setting for all layers")
        values |= {name: nested[name] for name in ROTARY_KEYS if nested.get(name) is not None}
        if "type" in nested:
            values.setdefault("rope_type", nested["type"])
    base = _float(values, "rope_theta", _float(raw, "rope_theta", 10000.0))
    share = _float(values, "partial_rotary_factor", _float(raw, "partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise NotNativeError(f"{rotary_dim} rotary channels per head are not an even number")
    kind = values.get("rope_type", "default")
    scaling = None
    if kind == "linear":
        scaling = RotaryScaling(kind="linear", factor=_float(values, "factor"))
    elif kind == "llama3":
        scaling = RotaryScaling(
            kind="llama3", factor=_float(values, "factor"),
            low_freq_factor=_float(values, "low_freq_factor"),
            high_freq_factor=_float(values, "high_freq_factor"),
            original_max_positions=_int(values, "original_max_position_embeddings", max_positions),
        )
    elif kind != "default":
        raise NotNativeError(f"rope_type {kind!r} is not default, linear or llama3")
    return {"rotary_dim": rotary_dim, "rotary_base": base, "rotary_scaling": scaling}


def _windows(raw: Json, family: str, num_layers: int) -> tuple[int | None, ...] | None:
    """Window of each layer. Mistral has one for all; qwen2 and qwen3 name the layers."""
    if family == "mistral":
        # transformers' default for a file without the key; null turns the window off.
        window = raw.get("sliding_window", 4096)
        return None if window is None else (_int(raw, "sliding_window", 4096),) * num_layers
    if family not in ("qwen2", "qwen3"):
        return None
    if not _bool(raw, "use_sliding_window", False):
        return None
    window, first = _int(raw, "sliding_window", 4096), _int(raw, "max_window_layers", 28, least=0)
    types = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    known = ("sliding_attention", "full_attention")
    if (not isinstance(types, list) or len(types) != num_layers
            or any(kind not in known for kind in types)):
        raise NotNativeError(f"layer_types are not {num_layers} of {' and '.join(known)}")
    if "sliding_attention" not in types:
        return None
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _read_llama_like(raw: Json, family: FamilyName) -> DecoderConfig:
    """llama, mistral, qwen2 and qwen3."""
    hidden_size, num_heads = _int(raw, "hidden_size"), _int(raw, "num_attention_heads")
    num_layers = _int(raw, "num_hidden_layers")
    head_dim = _int(raw, "head_dim", 128 if family == "qwen3" else hidden_size // num_heads)
    max_positions = _int(raw, "max_position_embeddings")
    bias = family in ("llama", "qwen3") and _bool(raw, "attention_bias", False)
    return DecoderConfig(
        **_common(raw, family), hidden_size=hidden_size, num_heads=num_heads,
        num_layers=num_layers, head_dim=head_dim, max_positions=max_positions,
        intermediate_size=_int(raw, "intermediate_size"),
        num_kv_heads=_int(raw, "num_key_value_heads", num_heads),
        norm_epsilon=_float(raw, "rms_norm_eps", 1e-6),
        activation=_activation(raw, "hidden_act", "silu"),
        **_rotary(raw, head_dim, max_positions), windows=_windows(raw, family, num_layers),
        qkv_bias=bias or family == "qwen2", attention_out_bias=bias,
        mlp_bias=family == "llama" and _bool(raw, "mlp_bias", False), qk_norm=family == "qwen3",
        tie_embeddings=_bool(raw, "tie_word_embeddings", False),
    )


def _read_gpt2(raw: Json) -> DecoderConfig:
    for key, expected in (("scale_attn_weights", True), ("add_cross_attention", False),
                          ("scale_attn_by_inverse_layer_idx", False)):
        if _bool(raw, key, expected) != expected:
            raise NotNativeError(f"{key} is {str(not expected).lower()}")
    hidden_size, num_heads = _int(raw, "n_embd"), _int(raw, "n_head")
    return DecoderConfig(
        **_common(raw, "gpt2"), hidden_size=hidden_size, num_heads=num_heads,
        num_layers=_int(raw, "n_layer"), num_kv_heads=num_heads, head_dim=hidden_size // num_heads,
        intermediate_size=_int(raw, "n_inner", 4 * hidden_size),
        max_positions=_int(raw, "n_positions"), norm="layer",
        norm_epsilon=_float(raw, "layer_norm_epsilon", 1e-5),
        activation=_activation(raw, "activation_function", "gelu_new"), gated_mlp=False,
        qkv_bias=True, attention_out_bias=True, mlp_bias=True,
        tie_embeddings=_bool(raw, "tie_word_embeddings", True),
    )


def _read_gpt_neox(raw: Json) -> DecoderConfig:
    hidden_size, num_heads = _int(raw, "hidden_size"), _int(raw, "num_attention_heads")
    max_positions = _int(raw, "max_position_embeddings")
    legacy = {"rope_theta": raw.get("rotary_emb_base"),
              "partial_rotary_factor": _float(raw, "rotary_pct", 0.25)}
    bias = _bool(raw, "attention_bias", True)
    return DecoderConfig(
        **_common(raw, "gpt_neox"), hidden_size=hidden_size, num_heads=num_heads,
        num_layers=_int(raw, "num_hidden_layers"), num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads, intermediate_size=_int(raw, "intermediate_size"),
        max_positions=max_positions, norm="layer",
        norm_epsilon=_float(raw, "layer_norm_eps", 1e-5),
        activation=_activation(raw, "hidden_act", "gelu"), gated_mlp=False,
        **_rotary(legacy | dict(raw), hidden_size // num_heads, max_positions),
        qkv_bias=bias, attention_out_bias=bias, mlp_bias=True,
        parallel_residual=_bool(raw, "use_parallel_residual", True),
        tie_embeddings=_bool(raw, "tie_word_embeddings", False),
    )


def read_config(raw: Json) -> DecoderConfig:
    """The native decoder that a config.json describes.

    Args:
        raw: The parsed file.
    Raises:
        NotNativeError: when the native decoder does not compute what it describes.
        ModelError: when a value is missing or impossible.
    """
    family = raw.get("model_type")
    if family in ("llama", "mistral", "qwen2", "qwen3"):
        return _read_llama_like(raw, family)
    if family == "gpt2":
        return _read_gpt2(raw)
    if family == "gpt_neox":
        return _read_gpt_neox(raw)
    raise NotNativeError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}")
