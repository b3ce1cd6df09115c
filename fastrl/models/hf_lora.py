"""LoRA on models that run through transformers: peft puts its modules into their trunk."""

from typing import Any

from torch import Tensor, nn

from fastrl.config import TrainConfig
from fastrl.errors import ConfigError, ModelError
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.hf import HFBackbone
from fastrl.models.spec import Adapters

ADAPTER = "default"
"""The name that peft gives the only adapter."""


def _trunk(model: CausalLM | ScalarModel) -> Any:
    assert isinstance(model.backbone, HFBackbone)
    return model.backbone.model


def add_adapters(model: CausalLM | ScalarModel, config: TrainConfig) -> Adapters:
    """Put peft's adapters into the trunk; B is 0, A is drawn from torch's generator.

    Raises:
        ModelError: when peft is not installed.
        ConfigError: when a target is no projection in the trunk.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"lora_rank: expected peft for {model.spec.architecture}, which runs "
                         "through transformers, found none; pip install peft, or set lora_rank to "
                         "0") from error
    import torch

    trunk = _trunk(model)
    known = dict.fromkeys(name.rpartition(".")[2] for name, (_, _) in _matrices(trunk).items())
    targets = tuple(known) if config.lora_targets is None else config.lora_targets
    unknown = [name for name in targets if name not in known]
    if unknown or not targets:
        raise ConfigError(f"lora_targets: expected names out of {', '.join(known)}, got "
                          f"{', '.join(unknown) or 'none'}; change lora_targets")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        peft.inject_adapter_in_model(peft.LoraConfig(
            r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(targets),
            lora_dropout=0.0, bias="none"), trunk, ADAPTER)
    dtype = next(trunk.parameters()).dtype
    for name, parameter in trunk.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    trunk.eval()
    return Adapters(rank=config.lora_rank, alpha=config.lora_alpha, targets=targets)


def remove_adapters(backbone: nn.Module) -> None:
    """Put the modules that peft wrapped back in their places."""
    from peft.tuners.lora import LoraLayer

    assert isinstance(backbone, HFBackbone)
    for path, module in list(backbone.model.named_modules()):
        if isinstance(module, LoraLayer):
            owner, _, name = path.rpartition(".")
            setattr(backbone.model.get_submodule(owner), name, module.get_base_layer())


def adapter_tensors(model: CausalLM | ScalarModel) -> dict[str, Tensor]:
    """A and B of every adapted module under its name in a checkpoint."""
    trunk = _trunk(model)
    return {f"{trunk.base_model_prefix}.{name.replace(f'.{ADAPTER}.', '.')}": parameter
            for name, parameter in trunk.named_parameters() if ".lora_" in name}


def _matrices(trunk: nn.Module) -> dict[str, tuple[Tensor, bool]]:
    """Every matrix of the trunk that rows are multiplied with, and whether it is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return {name: (module.weight.detach(), isinstance(module, Conv1D))
            for name, module in trunk.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def weights_by_name(model: CausalLM | ScalarModel) -> dict[str, tuple[Tensor, bool]]:
    """Every matrix under its name in a checkpoint, and whether it is [inputs, outputs]."""
    trunk = _trunk(model)
    return {f"{trunk.base_model_prefix}.{name}": found for name, found in _matrices(trunk).items()}
