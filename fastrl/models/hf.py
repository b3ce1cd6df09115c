"""Any other transformers architecture, with fastrl's attention in place of its own.

transformers calls a registered attention function after rotary and hands it every extra keyword
of the forward call, so the attention state travels as one. No mask function is registered: the
state alone says what a token sees. What this path cannot compute exactly is refused, first by
what the config says and then by comparing with transformers' own forward on a few tokens.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.errors import ModelError
from fastrl.models.attention import Attention
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.checkpointing import checkpointed
from fastrl.models.folder import WeightFiles, padding_id
from fastrl.models.heads import LMHead, ScalarHead
from fastrl.models.hf_probe import ATTENTION_NAME, probe

UNSUPPORTED_KEYS: dict[str, str] = {
    "attn_logit_softcapping": "it caps attention scores",
    "final_logit_softcapping": "it caps logits",
    "logit_scale": "it scales logits",
    "logits_scaling": "it scales logits",
    "attention_chunk_size": "it attends in chunks",
}
NEUTRAL_VALUES = (None, 0, 1)

KEPT_PRIVATE_KEYS = ("_remove_final_layer_norm",)
"""Keys with an underscore that describe an architecture (opt); others choose code or are stale."""


def fastrl_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, fastrl_state: Attention | None = None, scaling: float | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls instead of its own attention.

    Args:
        module: The attention module; `layer_idx` is its layer.
        query: [1, Hq, N, C].
        key, value: [1, Hk, N, C].
        fastrl_state: The attention state of this forward pass.
        softcap, s_aux: Score capping and attention sinks; refused.
    Returns:
        [1, N, Hq, C], and None for the attention weights.
    """
    if fastrl_state is None:
        raise ModelError(f"{type(module).__name__}: expected the keywords of the forward call, "
                         "got none; this architecture does not hand them on, use another model")
    if softcap is not None or s_aux is not None or not getattr(module, "is_causal", True):
        raise ModelError(f"{type(module).__name__}: expected plain causal attention, got score "
                         "capping, attention sinks or attention to later tokens; use another model")
    if value.shape[-1] != query.shape[-1]:
        raise ModelError(f"{type(module).__name__}: expected values as wide as queries, got "
                         f"{value.shape[-1]} and {query.shape[-1]} channels; use another model")
    out = fastrl_state(
        int(module.layer_idx), *(x[0].transpose(0, 1) for x in (query, key, value)),  # type: ignore[arg-type]
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, window=sliding_window,
    )
    return out[None], None


class HFBackbone(nn.Module):
    """The trunk of a transformers model under fastrl's contract.

    It stays in eval mode: dropout rates of a checkpoint would make two passes differ.

    Args:
        model: The trunk, such as `Phi3Model`, with its attention set to `ATTENTION_NAME`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval()
        self._activation_checkpointing = False

    @property
    def activation_checkpointing(self) -> bool:
        """Layers keep their inputs and run again in backward.

        Raises:
            ModelError: on setting it, when the architecture has no layers that can.
        """
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        if enabled and not _layers(self.model):
            raise ModelError(
                f"activation_checkpointing: expected layers that transformers marks as fit for it "
                f"in {type(self.model).__name__}, found none; set activation_checkpointing to "
                f"false, or use another model")
        self._activation_checkpointing = enabled

    def train(self, mode: bool = True) -> "HFBackbone":
        """Sets the flag of this module only."""
        self.training = mode
        return self

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attention,
        outputs: Tensor | None = None,
    ) -> Tensor:
        """[N, D] or [M, D], final norm applied; see `CausalLM.forward`."""
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        with _checkpointed_layers(self.model) if recompute else nullcontext():
            out = self.model(input_ids=token_ids[None], position_ids=positions[None],
                             use_cache=False, fastrl_state=attention)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden if outputs is None else hidden.index_select(0, outputs)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The layers that transformers would checkpoint itself, in train mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def _checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Inside the block each layer's forward is checkpointed; afterwards the model is as before.

    transformers' own switch works in train mode only, which would turn dropout on.
    """
    layers = _layers(model)
    for layer in layers:
        layer.forward = partial(checkpointed, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def load_causal_lm(
    path: str | Path, raw: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str
) -> CausalLM:
    """`fastrl.models.weights.load_causal_lm` for architectures that run through transformers."""
    from transformers import AutoModelForCausalLM

    full = _load(AutoModelForCausalLM, path, raw, dtype).to(device)
    unembedding = full.get_output_embeddings()
    head = LMHead(unembedding.weight, getattr(unembedding, "bias", None))
    backbone = HFBackbone(getattr(full, full.base_model_prefix))
    spec = probe(full, backbone, lambda hidden: head(hidden, F.linear), path)
    return CausalLM(backbone, head, spec).eval()


def load_scalar_model(
    path: str | Path, raw: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str,
    bias: float,
) -> ScalarModel:
    """`fastrl.models.weights.load_scalar_model` for architectures run through transformers."""
    from transformers import AutoModelForSequenceClassification

    full = _load(AutoModelForSequenceClassification, path, raw, dtype).to(device)
    score = getattr(full, "score", None)
    if not isinstance(score, nn.Linear) or score.weight.shape[0] != 1:
        raise ModelError(f"{path}: expected a reward model with a scalar head (score.weight), got "
                         f"a {type(full).__name__} without one; use another reward model")
    own_bias = 0.0 if score.bias is None else float(score.bias.detach())
    head = ScalarHead(nn.Parameter(score.weight.detach()[0]), own_bias + bias)
    backbone = HFBackbone(getattr(full, full.base_model_prefix))
    spec = probe(full, backbone, lambda hidden: (head(hidden) - bias)[:, None], path)
    return ScalarModel(backbone, head, spec).eval()


def save_causal_lm(model: CausalLM, target: Path, max_shard_bytes: int) -> None:
    """Write a model of this path with transformers' own code."""
    from transformers import AutoModelForCausalLM

    full = _shell(AutoModelForCausalLM, model.backbone)
    unembedding = full.get_output_embeddings()
    unembedding.weight = model.lm_head.weight
    if model.lm_head.bias is not None:
        unembedding.bias = model.lm_head.bias
    full.save_pretrained(target, max_shard_size=max_shard_bytes)


def save_scalar_model(
    model: ScalarModel, target: Path, extra: Mapping[str, Any], max_shard_bytes: int
) -> None:
    """Write a reward model of this path with transformers' own code."""
    from transformers import AutoModelForSequenceClassification

    trunk: Any = model.backbone.model
    pad = padding_id(trunk.config.pad_token_id, model.spec.eos_token_ids,
                     trunk.config.bos_token_id)
    full = _shell(AutoModelForSequenceClassification, model.backbone,
                  {**extra, "pad_token_id": pad})
    full.score.weight = nn.Parameter(model.head.weight.detach()[None])
    if full.score.bias is not None:  # the shift holds it: see load_scalar_model
        full.score.bias = nn.Parameter(torch.zeros(1))
    full.save_pretrained(target, max_shard_size=max_shard_bytes)


def _shell(auto_class: Any, backbone: nn.Module, extra: Mapping[str, Any] | None = None) -> Any:
    """A transformers model without weights of its own around a trunk."""
    assert isinstance(backbone, HFBackbone)
    config: Any = copy.deepcopy(backbone.model.config)
    for key, value in (extra or {}).items():
        setattr(config, key, value)
    model_class = _model_class(auto_class, config, "this model")
    with torch.device("meta"):
        full = model_class(config)
    setattr(full, full.base_model_prefix, backbone.model)
    return full


def _model_class(auto_class: Any, config: Any, path: str | Path) -> Any:
    """The transformers class for a config."""
    if type(config) not in auto_class._model_mapping:
        raise ModelError(f"{path}: expected an architecture with a class for "
                         f"{auto_class.__name__}, got {config.model_type}; use another model")
    return auto_class._model_mapping[type(config)]


def _without_private_keys(value: Any) -> Any:
    """A config without what could choose code: private keys and remote code, at every level."""
    if not isinstance(value, dict):
        return value
    return {key: _without_private_keys(item) for key, item in value.items()
            if (not key.startswith("_") or key in KEPT_PRIVATE_KEYS)
            and key != "auto_map" and "implementation" not in key}


def _refuse(config: Any, model_class: Any, path: str | Path) -> None:
    """Raise ModelError with the reason when a config names something this path cannot compute."""
    reasons = []
    if config.is_encoder_decoder:
        reasons.append("it is an encoder-decoder")
    if config.get_text_config() is not config:
        reasons.append("it reads more than text")
    if getattr(model_class, "_is_stateful", False):
        reasons.append("it carries a recurrent state")
    if not getattr(model_class, "_supports_attention_backend", False):
        reasons.append("its transformers code has no attention interface")
    reasons += [f"{reason} ({key} = {getattr(config, key)})"
                for key, reason in UNSUPPORTED_KEYS.items()
                if getattr(config, key, None) not in NEUTRAL_VALUES]
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention",
                                                               "sliding_attention"}
    if other:
        reasons.append(f"it has layers of type {', '.join(sorted(other))}")
    if reasons:
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: "
                         f"{'; '.join(reasons)}; use another model")


def _load(
    auto_class: Any, path: str | Path, raw: Mapping[str, Any], dtype: torch.dtype
) -> Any:
    """A transformers model with fastrl's attention, every weight read from the folder."""
    from transformers import AttentionInterface, AutoConfig

    settings = _without_private_keys(dict(raw))
    model_type = settings.pop("model_type", None)
    try:
        config = AutoConfig.for_model(model_type, **settings)
    except (ValueError, TypeError) as error:
        reason = str(error).partition(" Should contain one of")[0]  # hundreds of names follow
        raise ModelError(f"{path}: expected an architecture of transformers' own, got model_type "
                         f"{model_type!r} ({reason}); code in a checkpoint is never run") from error
    model_class = _model_class(auto_class, config, path)
    _refuse(config, model_class, path)
    WeightFiles(path)  # no weights, or only pickled ones: our message, not transformers'
    AttentionInterface.register(ATTENTION_NAME, fastrl_attention)
    try:
        full, info = model_class.from_pretrained(
            path, config=config, dtype=dtype, attn_implementation=ATTENTION_NAME,
            local_files_only=True, use_safetensors=True, output_loading_info=True,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: transformers could not load this folder: {error}") from error
    problems = [f"{kind.removesuffix('_keys')} {name}" for kind in ("missing_keys",
                "unexpected_keys", "mismatched_keys") for name in sorted(map(str, info[kind]))]
    if problems:
        raise ModelError(f"{path}: the weights do not fit config.json, {len(problems)} "
                         f"differences: {'; '.join(problems[:6])}; use the config.json that "
                         "belongs to them")
    return full.eval()
