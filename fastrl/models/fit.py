"""What a checkpoint must be before it is loaded, and its tensors put into a native decoder."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastrl.errors import ModelError
from fastrl.models.config import DecoderConfig
from fastrl.models.decoder import Decoder
from fastrl.models.folder import WeightFiles
from fastrl.models.names import IGNORED_SUFFIXES, TRUNK_PREFIX, Source, trunk_sources

REWARD_BIAS_KEY = "fastrl_reward_bias"
"""The reward shift, in config.json and adapter_config.json."""


def reward_bias(raw: dict[str, Any], path: str | Path) -> float:
    """The reward shift that a config names, 0 where there is none."""
    bias = raw.get(REWARD_BIAS_KEY, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise ModelError(f"{path}: {REWARD_BIAS_KEY}: expected a number, got {bias!r}; correct "
                         "config.json")
    return float(bias)


def class_name(raw: dict[str, Any]) -> str:
    """The class that a config.json names, or the model type."""
    names = raw.get("architectures")
    return str(names[0] if isinstance(names, list) and names else raw.get("model_type"))


def refuse_classifier(raw: dict[str, Any], path: str | Path) -> None:
    """Raise ModelError where a language model is expected and a classifier came."""
    if class_name(raw).endswith("ForSequenceClassification"):
        raise ModelError(f"{path}: expected a language model, got a {class_name(raw)}, which has "
                         "no LM head; use it as reward_model, or give a language model")


def refuse_many_labels(raw: dict[str, Any], path: str | Path) -> None:
    """Raise ModelError for anything but a classifier with one output."""
    if not class_name(raw).endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path}: expected a reward model (<Family>ForSequenceClassification with a scalar "
            f"head), got a {class_name(raw)}; train a reward model first, or give its folder")
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, dict) else raw.get("num_labels", 2)
    if count != 1:
        raise ModelError(f"{path}: expected a reward model with num_labels 1, got {count} labels; "
                         "a classifier is not a reward model")


def without_false_tie(config: DecoderConfig, files: WeightFiles, head_name: str) -> DecoderConfig:
    """Like transformers: a head that is there and differs from the embedding is not tied."""
    names = [name for name in files.names() if name.endswith(("embed_tokens.weight", "wte.weight",
                                                              "embed_in.weight"))]
    if not config.tie_embeddings or head_name not in files.names() or len(names) != 1:
        return config
    tied = torch.equal(files.read(names[0]), files.read(head_name))
    return config if tied else dataclasses.replace(config, tie_embeddings=False)


def located_trunk(config: DecoderConfig, files: WeightFiles) -> dict[str, Source]:
    """Sources of the trunk's parameters under the names that these files use."""
    prefix = TRUNK_PREFIX[config.family]
    if not any(name.startswith(prefix) for name in files.names()):
        prefix = ""  # saved without a head
    return {native: dataclasses.replace(source, names=tuple(prefix + n for n in source.names))
            for native, source in trunk_sources(config).items()}


def check_fit(
    config: DecoderConfig, trunk: dict[str, Source], head: dict[str, list[int]],
    files: WeightFiles, also_known: set[str],
) -> None:
    """Everything missing, unexpected or misshapen in one error, before memory is taken."""
    with torch.device("meta"):
        shapes = {native: p.shape for native, p in Decoder(config).named_parameters()}
    expected = head | {name: shape for native, source in trunk.items() for name, shape in
                       zip(source.names, source.shapes(shapes[native]), strict=True)}
    present = files.names()
    problems = [f"missing {name}" for name in expected if name not in present]
    problems += [f"unexpected {name}" for name in sorted(present - set(expected) - also_known)
                 if not name.endswith(IGNORED_SUFFIXES)]
    problems += [f"{name} has shape {files.shape(name)}, expected {shape}"
                 for name, shape in expected.items()
                 if name in present and files.shape(name) != shape]
    if problems:
        shown = "; ".join(problems[:6]) + ("; ..." if len(problems) > 6 else "")
        raise ModelError(f"{files.folder}: the weights do not fit config.json, {len(problems)} "
                         f"differences: {shown}; use the config.json that belongs to them")


@torch.no_grad()
def fill(parameter: nn.Parameter, source: Source, files: WeightFiles) -> None:
    """Write a native parameter from a checkpoint's tensors."""
    parameter.copy_(source.merge([files.read(name) for name in source.names]))


def fill_trunk(backbone: nn.Module, trunk: dict[str, Source], files: WeightFiles) -> None:
    """Write every parameter of a decoder."""
    for native, parameter in backbone.named_parameters():
        fill(parameter, trunk[native], files)
