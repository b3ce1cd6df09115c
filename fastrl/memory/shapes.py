"""Shapes of models without their weights: by name, from a checkpoint folder, or of a model."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.config import TrainConfig
from fastrl.errors import ModelError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.config import DecoderConfig
from fastrl.models.decoder import Decoder, causal_lm
from fastrl.models.folder import WeightFiles, model_folder, read_raw_config
from fastrl.models.heads import ScalarHead
from fastrl.models.lora import adapt
from fastrl.models.names import LM_HEAD_NAMES
from fastrl.models.read_config import NotNativeError, read_config
from fastrl.models.spec import ModelSpec
from fastrl.yaml_file import unknown_key

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
          "max_position_embeddings": 40960, "tie_word_embeddings": True}
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8,
           "max_position_embeddings": 131072, "tie_word_embeddings": True}


def _sizes(hidden: int, inner: int, layers: int, heads: int) -> dict[str, int]:
    return {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads}


NAMED: Mapping[str, Mapping[str, Any]] = {
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16),
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16),
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32),
    "qwen3-8b": _QWEN3 | _sizes(4096, 12288, 36, 32) | {"tie_word_embeddings": False},
    "qwen3-14b": _QWEN3 | _sizes(5120, 17408, 40, 40) | {"tie_word_embeddings": False},
    "qwen3-32b": _QWEN3 | _sizes(5120, 25600, 64, 64) | {"tie_word_embeddings": False},
    "llama-3.2-1b": _LLAMA3 | _sizes(2048, 8192, 16, 32),
    "llama-3.2-3b": _LLAMA3 | _sizes(3072, 8192, 28, 24),
    "llama-3.1-8b": _LLAMA3 | _sizes(4096, 14336, 32, 32) | {"tie_word_embeddings": False},
}
"""The sizes in the public config.json of these models; rotary scaling takes no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What the memory of a model follows from."""

    name: str
    """How messages call it."""
    trunk: tuple[int, ...]
    """Elements of each parameter of the trunk, the embedding included."""
    head: tuple[int, ...]
    """Elements of each parameter of the LM head; empty where it is the embedding."""
    adapters: tuple[int, ...] = ()
    """Elements of each parameter of the LoRA adapters; where there are some the rest is frozen."""
    adapter_width: int = 0
    """Numbers per token that all adapters' first products make."""
    adapts_head: bool = False
    decoder: DecoderConfig
    """The sizes; of an architecture that runs through transformers those that it shares."""

    @property
    def language_model(self) -> tuple[int, ...]:
        """Elements of each parameter of the trunk with its LM head and adapters."""
        return self.trunk + self.head + self.adapters

    @property
    def scalar_model(self) -> tuple[int, ...]:
        """Elements of each parameter of the trunk with a scalar head and adapters."""
        return (*self.trunk, self.decoder.hidden_size, *self.adapters)

    @property
    def trained_language_model(self) -> tuple[int, ...]:
        """Those of a language model that training changes."""
        return self.adapters or self.language_model

    @property
    def trained_scalar_model(self) -> tuple[int, ...]:
        """Those of a scalar model that training changes: its head always."""
        return (self.decoder.hidden_size, *self.adapters) if self.adapters else self.scalar_model

    def joined_head_bytes(self, dtype: torch.dtype) -> int:
        """What an LM head with an adapter takes in a call: its matrix beside B."""
        head = self.decoder.vocab_size * self.decoder.hidden_size
        return head * dtype.itemsize * self.adapts_head

    @property
    def has_frozen_head(self) -> bool:
        """True where no gradient of an LM head is made."""
        return bool(self.adapters) and not self.adapts_head


def joined(shapes: Sequence[ModelShape]) -> ModelShape:
    """One shape for models that wait and work together: all weights, activations of the widest."""
    widest = max(shapes, key=lambda shape: shape.decoder.hidden_size)
    others = [numel for shape in shapes if shape is not widest for numel in shape.scalar_model]
    return dataclasses.replace(widest, trunk=(*widest.trunk, *others))


def shape_of_config(name: str, config: DecoderConfig) -> ModelShape:
    """The shape of a native decoder; no memory is taken for weights."""
    with torch.device("meta"):
        trunk = tuple(p.numel() for p in Decoder(config).parameters())
    head = () if config.tie_embeddings else (config.vocab_size * config.hidden_size,)
    return ModelShape(name=name, trunk=trunk, head=head, decoder=config)


def shape_named(name: str) -> ModelShape:
    """The shape of a public model.

    Args:
        name: A key of `NAMED`.
    Raises:
        ModelError: for another name; the nearest one is named.
    """
    if name not in NAMED:
        raise ModelError(unknown_key(name, NAMED, "shape"))
    return shape_of_config(name, read_config(NAMED[name]))


def with_adapters(shape: ModelShape, config: TrainConfig, *, has_head: bool = True) -> ModelShape:
    """The shape with the adapters that a config asks for, unless it has some.

    Args:
        has_head: Of a language model, whose LM head may be a target.
    Raises:
        ConfigError: when a target is no projection of the model.
    """
    if config.lora_rank == 0 or shape.adapters:
        return shape
    return dataclasses.replace(shape, **_planned_adapters(
        shape.decoder, config.lora_rank, config.lora_targets, has_head))


@cache
def _planned_adapters(
    config: DecoderConfig, rank: int, targets: tuple[str, ...] | None, has_head: bool
) -> Mapping[str, Any]:
    """The fields of a shape that adapters fill, of a decoder without memory."""
    with torch.device("meta"):
        decoder = Decoder(config)
    model: CausalLM | ScalarModel = causal_lm(decoder)
    if not has_head:
        head = ScalarHead(nn.Parameter(torch.empty(config.hidden_size, device="meta")))
        model = ScalarModel(decoder, head, config.spec)
    adapt(model, TrainConfig(lora_rank=rank, lora_targets=targets))
    return _adapters_of(model)


def _adapters_of(model: CausalLM | ScalarModel) -> dict[str, Any]:
    """The fields of a shape that adapters fill."""
    found = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    return {"adapters": tuple(p.numel() for p in found.values()),
            "adapter_width": sum(p.shape[0] for name, p in found.items()
                                 if ".lora_a." in name.lower()),
            "adapts_head": any(name.startswith("lm_head.") for name in found)}


def shape_of_folder(path: str | Path) -> ModelShape:
    """The shape of a checkpoint, from config.json and the headers of its weight files.

    Adapters in a folder are merged when it is loaded: the shape is that of their base.

    An LM head in the files counts, also where config.json says that it is the embedding: whether
    the two are equal can only be seen in the weights.

    Raises:
        ModelError: when there is no such folder, its files are incomplete, or config.json names no
            sizes.
    """
    folder = model_folder(path)
    raw, files = read_raw_config(folder), WeightFiles(folder)
    numels = {name: math.prod(files.shape(name)) for name in files.names()}
    try:
        config = read_config(raw)
    except NotNativeError:
        return _shape_of_other(str(path), raw, numels)
    has_head = any(name in numels for name in (LM_HEAD_NAMES[config.family], "lm_head.weight"))
    if has_head:
        config = dataclasses.replace(config, tie_embeddings=False)
    shape = shape_of_config(str(path), config)
    if sum(numels.values()) < sum(shape.trunk):
        raise ModelError(f"{path}: expected weights of {sum(shape.trunk):,} elements, as "
                         f"config.json describes, got {sum(numels.values()):,}; the download may "
                         "be incomplete")
    return shape


def shape_of_model(name: str, model: CausalLM | ScalarModel) -> ModelShape:
    """The shape of a model that is there."""
    config = model.backbone.config if isinstance(model.backbone, Decoder) else _like(model.spec)
    trunk = {id(p): p.numel() for name, p in model.backbone.named_parameters()
             if ".lora_" not in name}
    head = (tuple(p.numel() for name, p in model.lm_head.named_parameters()
                  if id(p) not in trunk and not name.startswith("lora_"))
            if isinstance(model, CausalLM) else ())
    return ModelShape(name=name, trunk=tuple(trunk.values()), head=head, decoder=config,
                      **_adapters_of(model))


def _shape_of_other(path: str, raw: Mapping[str, Any], numels: Mapping[str, int]) -> ModelShape:
    """A model that runs through transformers: parameters as stored, activations as if native."""
    keys = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
            "hidden_size": "hidden_size", "vocab_size": "vocab_size",
            "max_positions": "max_position_embeddings"}
    missing = [key for key in keys.values() if not isinstance(raw.get(key), int)]
    if missing:
        raise ModelError(f"{path}: expected sizes in config.json to plan with, found no "
                         f"{', '.join(missing)}; give a model of similar size with --shape")
    sizes = {field: int(raw[key]) for field, key in keys.items()}
    spec = ModelSpec(
        architecture=str(raw.get("model_type")), **sizes, eos_token_ids=(),
        num_kv_heads=int(raw.get("num_key_value_heads") or sizes["num_heads"]),
        head_dim=int(raw.get("head_dim") or sizes["hidden_size"] // sizes["num_heads"]))
    is_head = {name: name.startswith("lm_head.") for name in numels}
    tied = bool(raw.get("tie_word_embeddings", True))
    return ModelShape(
        name=path, trunk=tuple(n for name, n in numels.items() if not is_head[name]),
        head=() if tied else tuple(n for name, n in numels.items() if is_head[name]),
        decoder=_like(spec, int(raw.get("intermediate_size") or 0)))


def _like(spec: ModelSpec, intermediate_size: int = 0) -> DecoderConfig:
    """A decoder of the sizes of another architecture, for what passes leave behind."""
    return DecoderConfig(
        family="llama", vocab_size=spec.vocab_size, hidden_size=spec.hidden_size,
        intermediate_size=intermediate_size or 4 * spec.hidden_size, num_layers=spec.num_layers,
        num_heads=spec.num_heads, num_kv_heads=spec.num_kv_heads, head_dim=spec.head_dim,
        max_positions=spec.max_positions, rotary_dim=spec.head_dim // 2 * 2)
