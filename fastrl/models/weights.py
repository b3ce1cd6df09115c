"""Loading and saving Hugging Face folders, for the native family and for transformers' models.

No pickle is read and no code of a checkpoint runs. What is saved here loads in transformers.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fastrl.models.hf as hf
from fastrl.errors import ModelError
from fastrl.models.adapter_files import merge_adapters, read_adapter_tensors, save_adapters
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.config import DecoderConfig
from fastrl.models.decoder import Decoder, causal_lm, empty_decoder
from fastrl.models.families import CAUSAL_CLASSES, SCALAR_CLASSES
from fastrl.models.fit import (
    REWARD_BIAS_KEY,
    check_fit,
    class_name,
    fill,
    fill_trunk,
    located_trunk,
    refuse_classifier,
    refuse_many_labels,
    reward_bias,
    without_false_tie,
)
from fastrl.models.folder import (
    ADAPTER_CONFIG,
    INDEX_NAME,
    SavesTokenizer,
    WeightFiles,
    base_folder,
    dtype_named,
    is_adapter_folder,
    model_folder,
    padding_id,
    read_json,
    read_raw_config,
    remove_adapter_files,
    write_json,
    write_tokenizer,
    write_weights,
)
from fastrl.models.heads import ScalarHead
from fastrl.models.names import (
    LM_HEAD_NAMES,
    TRUNK_PREFIX,
    Source,
    trunk_sources,
)
from fastrl.models.read_config import NotNativeError, read_config
from fastrl.models.write_config import write_config

Implementation = Literal["auto", "native", "transformers"]

MAX_SHARD_BYTES = 5 * 10**9


def load_causal_lm(
    path: str | Path, dtype: str = "float32", device: torch.device | str = "cpu",
    implementation: Implementation = "auto",
) -> CausalLM:
    """A language model from a Hugging Face folder, in eval mode.

    Args:
        path: Local folder with config.json and safetensors weights, or with adapters in peft's
            format, which are merged into their base model.
        dtype: float32, bfloat16 or float64, whatever the files hold.
        device: Where the model lives.
        implementation: `auto` takes the native decoder where it computes what the config asks
            for and transformers otherwise; `native` and `transformers` insist.
    Raises:
        ModelError: when the folder is not a language model, is incomplete or damaged, holds only
            pickled weights, or cannot be run by the implementation asked for.
    """
    if is_adapter_folder(path):
        model = load_causal_lm(_base(path), dtype, device, implementation)
        merge_adapters(model, path)
    else:
        model = _load_causal_lm(path, dtype, device, implementation)
    model.folder = str(path)
    return model


def _load_causal_lm(
    path: str | Path, dtype: str, device: torch.device | str, implementation: Implementation
) -> CausalLM:
    """`load_causal_lm` of a folder with weights."""
    raw = read_raw_config(path)
    refuse_classifier(raw, path)
    config = _native_config(raw, implementation)
    if config is None:
        return hf.load_causal_lm(path, raw, dtype_named(dtype), device)
    files = WeightFiles(path)
    head_names = [n for n in dict.fromkeys((LM_HEAD_NAMES[config.family], "lm_head.weight"))
                  if n in files.names()]
    head_name = head_names[0] if head_names else LM_HEAD_NAMES[config.family]
    config = without_false_tie(config, files, head_name)
    trunk = located_trunk(config, files)
    head = {} if config.tie_embeddings else {head_name: [config.vocab_size, config.hidden_size]}
    check_fit(config, trunk, head, files, also_known=set(head_names))
    model = causal_lm(empty_decoder(config, dtype_named(dtype), device))
    fill_trunk(model.backbone, trunk, files)
    if not config.tie_embeddings:
        fill(model.lm_head.weight, Source((head_name,)), files)
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
    if is_adapter_folder(path):
        return _load_adapted_scalar(path, dtype, device, implementation)
    raw = read_raw_config(path)
    bias = reward_bias(raw, path)
    refuse_many_labels(raw, path)
    config = _native_config(raw, implementation)
    if config is None:
        return hf.load_scalar_model(path, raw, dtype_named(dtype), device, bias)
    files = WeightFiles(path)
    if "score.weight" not in files.names():
        raise ModelError(f"{path}: expected a reward model with a scalar head (score.weight), got "
                         f"a {class_name(raw)} without one; train a reward model first")
    trunk = located_trunk(config, files)
    check_fit(config, trunk, {"score.weight": [1, config.hidden_size]}, files,
               also_known={"lm_head.weight", LM_HEAD_NAMES[config.family]})
    backbone = empty_decoder(config, dtype_named(dtype), device)
    fill_trunk(backbone, trunk, files)
    weight = files.read("score.weight")[0].to(device, dtype_named(dtype), copy=True)
    return ScalarModel(backbone, ScalarHead(nn.Parameter(weight), bias), config.spec).eval()


def _load_adapted_scalar(
    path: str | Path, dtype: str, device: torch.device | str, implementation: Implementation
) -> ScalarModel:
    """A scalar model from adapters on a language model's trunk, and a head beside them."""
    tensors = read_adapter_tensors(path)
    weight = tensors.get("score.weight")
    base = load_causal_lm(_base(path), dtype, device, implementation)
    if weight is None or list(weight.shape) != [1, base.spec.hidden_size]:
        raise ModelError(f"{path}: expected adapters of a reward model with a scalar head "
                         f"score.weight [1, {base.spec.hidden_size}], got "
                         f"{'none' if weight is None else list(weight.shape)}; train a reward "
                         "model first")
    head = ScalarHead(nn.Parameter(weight[0].to(device, dtype_named(dtype), copy=True)),
                      reward_bias(read_json(Path(path) / ADAPTER_CONFIG), path))
    model = ScalarModel(base.backbone, head, base.spec).eval()
    merge_adapters(model, path)
    return model


def is_scalar_adapter(path: str | Path) -> bool:
    """True for the adapters of a reward model or critic."""
    return read_json(Path(path) / ADAPTER_CONFIG).get("task_type") == "SEQ_CLS"


def _base(path: str | Path) -> Path:
    """The base of an adapter folder, once it is known to lead to weights."""
    model_folder(path)
    return base_folder(path)


def save_causal_lm(
    model: CausalLM, path: str | Path, tokenizer_from: str | Path | SavesTokenizer | None = None,
    *, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a language model as a Hugging Face folder that transformers reads.

    Of a model with adapters these alone are written, as peft reads them.

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
    if model.adapters is not None:
        _write_adapters(model, target)
    elif isinstance(model.backbone, hf.HFBackbone):
        target.mkdir(parents=True, exist_ok=True)
        remove_adapter_files(target)
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
    so a padding token that also ends texts is replaced by one that does not. Of a model with
    adapters these and the head are written, as peft reads them.
    """
    target, bias = Path(path), float(model.head.bias)
    extra: dict[str, Any] = {
        "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, REWARD_BIAS_KEY: bias,
    }
    if model.adapters is not None:
        _write_adapters(model, target)
    elif isinstance(model.backbone, hf.HFBackbone):
        target.mkdir(parents=True, exist_ok=True)
        remove_adapter_files(target)
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


def _decoder(model: CausalLM | ScalarModel) -> Decoder:
    if not isinstance(model.backbone, Decoder):
        raise ModelError(f"expected a model with a Decoder or HFBackbone, got a backbone of type "
                         f"{type(model.backbone).__name__}; save it with its own library")
    return model.backbone


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


def _write_adapters(model: CausalLM | ScalarModel, target: Path) -> None:
    """Adapters in a folder that holds no other weights."""
    target.mkdir(parents=True, exist_ok=True)
    for stale in [*target.glob("model*.safetensors"), target / INDEX_NAME, target / "config.json"]:
        stale.unlink(missing_ok=True)
    save_adapters(model, target)


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
