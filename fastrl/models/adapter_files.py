"""Adapters as files in peft's format: adapter_config.json and adapter_model.safetensors.

What is saved here loads in peft. What is loaded here is merged: the model that comes out is a plain
one, W + scale B A, added in float32 or wider and rounded once.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.errors import ModelError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.decoder import Decoder
from fastrl.models.fit import REWARD_BIAS_KEY
from fastrl.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json, write_json
from fastrl.models.hf import HFBackbone
from fastrl.models.lora import HEAD, LoRAHead, LoRALinear, Site, sites
from fastrl.models.names import LM_HEAD_NAMES, TRUNK_PREFIX

PREFIX = "base_model.model."
SCORE = "score"
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"), "use_dora": (None, False), "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}), "layer_replication": (None,), "trainable_token_indices": (None,),
    "target_parameters": (None, []), "alora_invocation_tokens": (None,), "lora_bias": (None, False),
}
"""Key of adapter_config.json -> values under which an adapter is two matrices and no more."""


def save_adapters(model: CausalLM | ScalarModel, target: Path) -> None:
    """Write a model's adapters, and the head of a scalar model, as peft does.

    Args:
        model: Has adapters.
        target: Folder, which exists.
    """
    from safetensors.torch import save_file

    adapters = model.adapters
    assert adapters is not None
    tensors = {PREFIX + name: tensor.detach().to("cpu").contiguous()
               for name, tensor in _adapter_tensors(model).items()}
    config: dict[str, Any] = {
        "peft_type": "LORA", "r": adapters.rank, "lora_alpha": adapters.alpha,
        "target_modules": sorted(adapters.targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": model.spec.architecture == "gpt2", "inference_mode": True,
        "base_model_name_or_path": None if model.folder is None else os.path.abspath(model.folder),
        "task_type": "CAUSAL_LM"}
    if isinstance(model, ScalarModel):
        tensors[f"{PREFIX}{SCORE}.weight"] = model.head.weight.detach().to("cpu")[None].clone()
        config |= {"task_type": "SEQ_CLS", "modules_to_save": [SCORE],
                   REWARD_BIAS_KEY: float(model.head.bias)}
    save_file(tensors, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    write_json(target / ADAPTER_CONFIG, config)


def _adapter_tensors(model: CausalLM | ScalarModel) -> dict[str, Tensor]:
    """A and B of every projection under its name in a checkpoint."""
    if isinstance(model.backbone, HFBackbone):
        from fastrl.models import hf_lora

        return hf_lora.adapter_tensors(model)
    decoder = model.backbone
    assert isinstance(decoder, Decoder)
    tensors: dict[str, Tensor] = {}
    for site in sites(decoder):
        module = decoder.get_submodule(site.path)
        if not isinstance(module, LoRALinear):
            continue
        names = [name for name, adapted in zip(site.names, module.is_adapted, strict=True)
                 if adapted]
        for name, a, b in zip(names, torch.split(module.lora_a.weight, module.rank),
                              module.lora_b, strict=True):
            full = TRUNK_PREFIX[decoder.config.family] + name
            tensors[f"{full}.lora_A.weight"] = a
            assert isinstance(b.weight, Tensor)
            tensors[f"{full}.lora_B.weight"] = _outputs_as_stored(site, b.weight)
    if isinstance(model, CausalLM) and isinstance(model.lm_head, LoRAHead):
        name = LM_HEAD_NAMES[decoder.config.family].removesuffix(".weight")
        tensors[f"{name}.lora_A.weight"] = model.lm_head.lora_a.weight
        tensors[f"{name}.lora_B.weight"] = model.lm_head.lora_b.weight
    return tensors


def _outputs_as_stored(site: Site, b: Tensor) -> Tensor:
    """B [outputs, r] with its rows in the order of a checkpoint."""
    return site.source.split(b)[0] if site.source.layout == "by_head" else b


def merge_adapters(model: CausalLM | ScalarModel, path: str | Path) -> None:
    """Add the adapters in a folder to a model's weights, in place.

    Args:
        model: The adapters' base, without adapters; with a head of its own where the folder has
            one for it. A tied LM head that an adapter changes is no longer tied.
    Raises:
        ModelError: when they are of a kind that is no plain sum, or do not fit the model.
    """
    config = read_json(Path(path) / ADAPTER_CONFIG)
    scale = _checked_scale(config, path)
    tensors = read_adapter_tensors(path)
    if isinstance(model, ScalarModel):
        tensors.pop(f"{SCORE}.weight", None)
    elif f"{SCORE}.weight" in tensors:
        raise ModelError(f"{path}: expected adapters of a language model, got a reward model's "
                         f"({SCORE}.weight); give the folder of a policy")
    names = {name.rpartition(".lora_")[0] for name in tensors}
    expected = {f"{name}.lora_{letter}.weight" for name in names for letter in "AB"}
    if expected != tensors.keys():
        differences = sorted(expected ^ tensors.keys())[:4]
        raise ModelError(f"{path}: expected a lora_A.weight and a lora_B.weight for each projection"
                         f", got other or missing tensors: {', '.join(differences)}; only plain "
                         "LoRA can be read")
    adders = (_hf_adders(model) if isinstance(model.backbone, HFBackbone)
              else _decoder_adders(model))
    unknown = sorted(names - adders.keys())
    if unknown:
        raise ModelError(f"{path}: expected adapters for projections of the base model, got "
                         f"{', '.join(unknown[:4])}; use the base model that they were trained on")
    for name in sorted(names):
        a, b = (tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
        if a.shape[0] != config["r"]:
            raise ModelError(f"{path}: expected adapters of rank {config['r']}, as r in "
                             f"{ADAPTER_CONFIG} says, got A {list(a.shape)} of {name}; copy both "
                             "files of the folder again")
        wide = torch.promote_types(a.dtype, torch.float32)
        try:
            adders[name](scale * (b.to(wide) @ a.to(wide)))
        except RuntimeError as error:
            raise ModelError(f"{path}: expected an adapter that fits {name}, got A {list(a.shape)} "
                             f"and B {list(b.shape)}; use the base model that it was trained on"
                             ) from error


def read_adapter_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter folder, under the base model's names.

    Raises:
        ModelError: when the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path) / ADAPTER_WEIGHTS
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: expected a safetensors file with adapters, got {error}; get the "
                         "file anew") from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _checked_scale(config: dict[str, Any], path: str | Path) -> float:
    """alpha / r of plain LoRA, alpha / sqrt(r) of rank-stabilised LoRA."""
    for key, neutral in REFUSED.items():
        if config.get(key) not in neutral:
            raise ModelError(f"{path}: expected plain LoRA, got {key} = {config[key]!r}; merge the "
                             "adapters with peft and give the merged model")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(rank, int) or rank < 1 \
            or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise ModelError(f"{path}: expected peft_type LORA with r and lora_alpha, got peft_type "
                         f"{config.get('peft_type')!r}, r {rank!r}, lora_alpha {alpha!r}; give an "
                         "adapter folder of LoRA")
    return float(alpha) / (rank ** 0.5 if config.get("use_rslora") else rank)


Adder = Callable[[Tensor], None]
"""Adds a matrix [outputs, inputs], as a checkpoint orders it, to a projection."""


@torch.no_grad()
def _add(weight: Tensor, added: Tensor) -> None:
    """Add in the wider type and round once."""
    if weight.shape != added.shape:
        raise RuntimeError  # not what broadcasting makes of it
    weight.copy_(weight.to(added.dtype) + added.to(weight.device))


def _decoder_adders(model: CausalLM | ScalarModel) -> dict[str, Adder]:
    """By name in a checkpoint, how a projection of the native decoder is changed."""
    decoder = model.backbone
    assert isinstance(decoder, Decoder)
    adders: dict[str, Adder] = {}
    for site in sites(decoder):
        weight = decoder.get_submodule(site.path).weight
        assert isinstance(weight, Tensor)
        parts = torch.split(weight.detach(), list(site.rows))
        for name, part in zip(site.names, parts, strict=True):
            def add(added: Tensor, part: Tensor = part, site: Site = site) -> None:
                in_order = site.source.merge([added]) if site.source.layout == "by_head" else added
                _add(part, in_order)

            adders[TRUNK_PREFIX[decoder.config.family] + name] = add
    if isinstance(model, CausalLM):
        adders |= dict.fromkeys(
            (HEAD, LM_HEAD_NAMES[decoder.config.family].removesuffix(".weight")),
            lambda added: _add_to_head(model, added))
    return adders


def _add_to_head(model: CausalLM, added: Tensor) -> None:
    """Change the LM head, and the embedding not."""
    decoder = model.backbone
    if isinstance(decoder, Decoder) and decoder.config.tie_embeddings:
        decoder.untie()
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    _add(model.lm_head.weight, added)


def _hf_adders(model: CausalLM | ScalarModel) -> dict[str, Adder]:
    from fastrl.models import hf_lora

    return {name: lambda added, weight=weight, turned=turned:  # type: ignore[misc]
            _add(weight, added.T if turned else added)
            for name, (weight, turned) in hf_lora.weights_by_name(model).items()}
