"""Loading and saving Hugging Face folders, for the native family and for transformers' models.

No pickle is read and no code of a checkpoint runs. What is saved here loads in transformers.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastrl.models.hf as hf
from fastrl.errors import ModelError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.config import DecoderConfig
from fastrl.models.decoder import Decoder, causal_lm, empty_decoder
from fastrl.models.families import CAUSAL_CLASSES, SCALAR_CLASSES
from fastrl.models.folder import (
    SavesTokenizer,
    WeightFiles,
    dtype_named,
    padding_id,
    read_raw_config,
    write_json,
    write_tokenizer,
    write_weights,
)
from fastrl.models.heads import ScalarHead
from fastrl.models.names import (
    IGNORED_SUFFIXES,
    LM_HEAD_NAMES,
    TRUNK_PREFIX,
    Source,
    trunk_sources,
)
from fastrl.models.read_config import NotNativeError, read_config
from fastrl.models.write_config import write_config

Implementation = Literal["auto", "native", "transformers"]

MAX_SHARD_BYTES = 5 * 10**9
REWARD_BIAS_KEY = "fastrl_reward_bias"


def load_causal_lm(
    path: str | Path, dtype: str = "float32", device: torch.device | str = "cpu",
    implementation: Implementation = "auto",
) -> CausalLM:
    """A language model from a Hugging Face folder, in eval mode.

    Args:
        path: Local folder with config.json and safetensors weights.
        dtype: float32, bfloat16 or float64, whatever the files hold.
        device: Where the model lives.
        implementation: `auto` takes the native decoder where it computes what the config asks
            for and transformers otherwise; `native` and `transformers` insist.
    Raises:
        ModelError: when the folder is not a language model, is incomplete or damaged, holds only
            pickled weights, or cannot be run by the implementation asked for.
    """
    raw = read_raw_config(path)
    _refuse_classifier(raw, path)
    config = _native_config(raw, implementation)
    if config is None:
        return hf.load_causal_lm(path, raw, dtype_named(dtype), device)
    files = WeightFiles(path)
    head_names = [n for n in dict.fromkeys((LM_HEAD_NAMES[config.family], "lm_head.weight"))
                  if n in files.names()]
    head_name = head_names[0] if head_names else LM_HEAD_NAMES[config.family]
    config = _without_false_tie(config, files, head_name)
    trunk = _located_trunk(config, files)
    head = {} if config.tie_embeddings else {head_name: [config.vocab_size, config.hidden_size]}
    _check_fit(config, trunk, head, files, also_known=set(head_names))
    model = causal_lm(empty_decoder(config, dtype_named(dtype), device))
    _fill_trunk(model.backbone, trunk, files)
    if not config.tie_embeddings:
        _fill(model.lm_head.weight, Source((head_name,)), files)
    return model.eval()


def load_scalar_model(
    path: str | Path, dtype: str = "float32", device: torch.device | str = "cpu",
    implementation: Implementation = "auto",
) -> ScalarModel:
    """A reward model or critic from a transformers sequence-classification folder, in eval mode.

    The reward shift is the key `fastrl_reward_bias` of config.json, 0 where there is none:
    reward = transformers' logit + shift. Arguments as in `load_causal_lm`.

    Raises:
        ModelError: as `load_causal_lm`, and when the model has no head with one output.
    """
    raw = read_raw_config(path)
    bias = raw.get(REWARD_BIAS_KEY, 0.0)
    if isinstance(bias, bool) or not isinstance(bias, (int, float)):
        raise ModelError(f"{path}: {REWARD_BIAS_KEY}: expected a number, got {bias!r}; correct "
                         "config.json")
    _refuse_many_labels(raw, path)
    config = _native_config(raw, implementation)
    if config is None:
        return hf.load_scalar_model(path, raw, dtype_named(dtype), device, float(bias))
    files = WeightFiles(path)
    if "score.weight" not in files.names():
        raise ModelError(f"{path}: expected a reward model with a scalar head (score.weight), got "
                         f"a {_class_name(raw)} without one; train a reward model first")
    trunk = _located_trunk(config, files)
    _check_fit(config, trunk, {"score.weight": [1, config.hidden_size]}, files,
               also_known={"lm_head.weight", LM_HEAD_NAMES[config.family]})
    backbone = empty_decoder(config, dtype_named(dtype), device)
    _fill_trunk(backbone, trunk, files)
    weight = files.read("score.weight")[0].to(device, dtype_named(dtype), copy=True)
    return ScalarModel(backbone, ScalarHead(nn.Parameter(weight), float(bias)), config.spec).eval()


def save_causal_lm(
    model: CausalLM, path: str | Path, tokenizer_from: str | Path | SavesTokenizer | None = None,
    *, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a language model as a Hugging Face folder that transformers reads.

    Args:
        model: Native or through transformers.
        path: Folder, made when missing; weights of an earlier save in it are replaced.
        tokenizer_from: Folder whose tokenizer files are copied byte by byte, an encoder that
            saves its own, or None for no tokenizer.
        max_shard_bytes: Larger models are split into files of at most this size.
    Raises:
        ModelError: when the decoder is not one that its family's config.json can describe.
    """
    target = Path(path)
    if isinstance(model.backbone, hf.HFBackbone):
        target.mkdir(parents=True, exist_ok=True)
        hf.save_causal_lm(model, target, max_shard_bytes)
    else:
        config = _decoder(model).config
        raw = write_config(config) | {"architectures": [CAUSAL_CLASSES[config.family]]}
        tensors = _trunk_tensors(_decoder(model))
        if not config.tie_embeddings:
            tensors[LM_HEAD_NAMES[config.family]] = model.lm_head.weight
        _write_folder(target, raw, tensors, max_shard_bytes)
    write_tokenizer(target, tokenizer_from)


def save_scalar_model(
    model: ScalarModel, path: str | Path,
    tokenizer_from: str | Path | SavesTokenizer | None = None,
    *, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a reward model or critic as a transformers sequence-classification folder.

    `num_labels` is 1 and the reward shift is the key `fastrl_reward_bias`. Arguments as in
    `save_causal_lm`. transformers reads the score at the last token that is not `pad_token_id`,
    so a padding token that also ends texts is replaced by one that does not.
    """
    target, bias = Path(path), float(model.head.bias)
    extra: dict[str, Any] = {
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, REWARD_BIAS_KEY: bias,
    }
    if isinstance(model.backbone, hf.HFBackbone):
        target.mkdir(parents=True, exist_ok=True)
        hf.save_scalar_model(model, target, extra, max_shard_bytes)
    else:
        config = _decoder(model).config
        pad = padding_id(config.pad_token_id, config.eos_token_ids, config.bos_token_id)
        raw = write_config(config) | extra | {
            "architectures": [SCALAR_CLASSES[config.family]], "pad_token_id": pad}
        tensors = _trunk_tensors(_decoder(model)) | {"score.weight": model.head.weight[None]}
        _write_folder(target, raw, tensors, max_shard_bytes)
    write_tokenizer(target, tokenizer_from)


def _native_config(raw: dict[str, Any], implementation: Implementation) -> DecoderConfig | None:
    """The native decoder's config, or None when transformers shall run the model."""
    if implementation not in ("auto", "native", "transformers"):
        raise ModelError(f"implementation: expected auto, native or transformers, got "
                         f"{implementation!r}")
    if implementation == "transformers":
        return None
    try:
        return read_config(raw)
    except NotNativeError as error:
        if implementation == "native":
            raise NotNativeError(f"the native decoder cannot run this model: {error}; use "
                                 "implementation 'auto' or 'transformers'") from None
        return None


def _class_name(raw: dict[str, Any]) -> str:
    names = raw.get("architectures")
    return str(names[0] if isinstance(names, list) and names else raw.get("model_type"))


def _refuse_classifier(raw: dict[str, Any], path: str | Path) -> None:
    if _class_name(raw).endswith("ForSequenceClassification"):
        raise ModelError(f"{path}: expected a language model, got a {_class_name(raw)}, which has "
                         "no LM head; use it as reward_model, or give a language model")


def _refuse_many_labels(raw: dict[str, Any], path: str | Path) -> None:
    if not _class_name(raw).endswith("ForSequenceClassification"):
        raise ModelError(
            f"{path}: expected a reward model (<Family>ForSequenceClassification with a scalar "
            f"head), got a {_class_name(raw)}; train a reward model first, or give its folder")
    labels = raw.get("id2label")
    count = len(labels) if isinstance(labels, dict) else raw.get("num_labels", 2)
    if count != 1:
        raise ModelError(f"{path}: expected a reward model with num_labels 1, got {count} labels; "
                         "a classifier is not a reward model")


def _decoder(model: CausalLM | ScalarModel) -> Decoder:
    if not isinstance(model.backbone, Decoder):
        raise ModelError(f"expected a model with a Decoder or HFBackbone, got a backbone of type "
                         f"{type(model.backbone).__name__}; save it with its own library")
    return model.backbone


def _without_false_tie(config: DecoderConfig, files: WeightFiles, head_name: str) -> DecoderConfig:
    """Like transformers: a head that is there and differs from the embedding is not tied."""
    names = [name for name in files.names() if name.endswith(("embed_tokens.weight", "wte.weight",
                                                              "embed_in.weight"))]
    if not config.tie_embeddings or head_name not in files.names() or len(names) != 1:
        return config
    tied = torch.equal(files.read(names[0]), files.read(head_name))
    return config if tied else dataclasses.replace(config, tie_embeddings=False)


def _located_trunk(config: DecoderConfig, files: WeightFiles) -> dict[str, Source]:
    """Sources of the trunk's parameters under the names that these files use."""
    prefix = TRUNK_PREFIX[config.family]
    if not any(name.startswith(prefix) for name in files.names()):
        prefix = ""  # saved without a head
    return {native: dataclasses.replace(source, names=tuple(prefix + n for n in source.names))
            for native, source in trunk_sources(config).items()}


def _check_fit(
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
def _fill(parameter: nn.Parameter, source: Source, files: WeightFiles) -> None:
    parameter.copy_(source.merge([files.read(name) for name in source.names]))


def _fill_trunk(backbone: nn.Module, trunk: dict[str, Source], files: WeightFiles) -> None:
    for native, parameter in backbone.named_parameters():
        _fill(parameter, trunk[native], files)


def _trunk_tensors(decoder: Decoder) -> dict[str, Tensor]:
    """The trunk under its Hugging Face names."""
    prefix = TRUNK_PREFIX[decoder.config.family]
    parameters = dict(decoder.named_parameters())
    return {
        prefix + name: tensor
        for native, source in trunk_sources(decoder.config).items()
        for name, tensor in zip(source.names, source.split(parameters[native].detach()),
                                strict=True)
    }


def _write_folder(
    target: Path, raw: dict[str, Any], tensors: dict[str, Tensor], max_shard_bytes: int
) -> None:
    """config.json, generation_config.json and weights."""
    target.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_weights(target, tensors.items(), max_shard_bytes)
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(target / "generation_config.json",
                        {key: value for key, value in ids.items() if value is not None})
    write_json(target / "config.json", raw | {"dtype": dtype})
