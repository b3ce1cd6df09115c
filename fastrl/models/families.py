"""The native families as config.json: what is read, what is written, and what is refused.

Only the keys named here are read; every other key of a downloaded config.json is ignored.
"""

from collections.abc import Mapping
from typing import Any

from fastrl.errors import ModelError
from fastrl.models.decoder import ACTIVATIONS, DecoderConfig, FamilyName, RotaryScaling

Json = Mapping[str, Any]

CAUSAL_CLASSES: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}
SCALAR_CLASSES: dict[str, str] = {
    "llama": "LlamaForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
    "gpt_neox": "GPTNeoXForSequenceClassification",
}
ROTARY_KEYS = ("rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings", "partial_rotary_factor")


class NotNativeError(ModelError):
    """The native decoder does not compute what a config.json asks for; transformers may."""


def _int(raw: Json, key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"config.json: {key}: expected a whole number of at least 1, got "
                         f"{value!r}; correct the file")
    return value


def _float(raw: Json, key: str, default: float | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"config.json: {key}: expected a number, got {value!r}; correct the file")
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
    if name not in ACTIVATIONS:
        raise NotNativeError(f"{key} {name!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
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
            raise NotNativeError(f"{key} differs by layer")
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
        window = None
    else:
        window = _int(raw, "sliding_window", 4096)
    first = _int({"n": raw.get("max_window_layers", 28) + 1}, "n") - 1
    types = raw.get("layer_types") or [
        "sliding_attention" if window is not None and i >= first else "full_attention"
        for i in range(num_layers)
    ]
    if set(types) - {"sliding_attention", "full_attention"} or len(types) != num_layers:
        raise NotNativeError(f"layer_types {sorted(set(types))} for {num_layers} layers")
    if window is None or "sliding_attention" not in types:
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
    raise NotNativeError(f"model_type {family!r} is not one of {', '.join(CAUSAL_CLASSES)}")


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


def decoder_config(
    family: FamilyName, *, vocab_size: int, hidden_size: int, num_layers: int, num_heads: int,
    max_positions: int, num_kv_heads: int | None = None, intermediate_size: int | None = None,
    tie_embeddings: bool = True, bos_token_id: int | None = None,
    eos_token_ids: tuple[int, ...] = (), pad_token_id: int | None = None,
) -> DecoderConfig:
    """A new decoder of a family, with the family's own switches.

    Args:
        num_kv_heads: None takes num_heads; gpt2 and gpt_neox have no other choice.
        intermediate_size: None takes 8/3 of hidden_size, rounded up to a multiple of 8.
    Raises:
        ModelError: when the sizes do not fit together or do not exist in the family.
    """
    kv_heads = num_kv_heads or num_heads
    inner = intermediate_size or -(-hidden_size * 8 // 24) * 8
    if hidden_size % num_heads:
        raise ModelError(f"hidden_size: expected a multiple of num_heads ({num_heads}), got "
                         f"{hidden_size}; change one of them")
    if family in ("gpt2", "gpt_neox") and kv_heads != num_heads:
        raise ModelError(f"num_kv_heads: expected {num_heads} (num_heads) in the family {family}, "
                         f"got {kv_heads}; leave it out")
    ids = {"bos_token_id": bos_token_id, "eos_token_id": list(eos_token_ids),
           "pad_token_id": pad_token_id}
    shape = {"model_type": family, "vocab_size": vocab_size, "tie_word_embeddings": tie_embeddings}
    if family == "gpt2":
        return read_config(shape | ids | {
            "n_embd": hidden_size, "n_layer": num_layers, "n_head": num_heads, "n_inner": inner,
            "n_positions": max_positions})
    return read_config(shape | ids | {
        "hidden_size": hidden_size, "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads, "num_key_value_heads": kv_heads,
        "intermediate_size": inner, "max_position_embeddings": max_positions,
        "head_dim": hidden_size // num_heads, "sliding_window": None})
