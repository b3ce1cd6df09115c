"""Any other transformers architecture, with fastrl's attention in place of its own.

transformers calls a registered attention function after rotary and hands it every extra keyword
of the forward call, so the attention state travels as one. No mask function is registered: the
state alone says what a token sees. What this path cannot compute exactly is refused, first by
what the config says and then by comparing with transformers' own forward on a few tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.errors import ModelError
from fastrl.models.attention import Attention, PackedAttention
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.folder import WeightFiles
from fastrl.models.heads import LMHead, ScalarHead
from fastrl.models.spec import ModelSpec
from fastrl.packing import pack_sequences

# A plain name: transformers treats names with "flash", "sdpa" or a slash in a special way.
ATTENTION_NAME = "fastrl_attention"

PROBE_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Largest difference on the probe, as a share of the largest logit."""

UNSUPPORTED_KEYS: dict[str, str] = {
    "attn_logit_softcapping": "it caps attention scores",
    "final_logit_softcapping": "it caps logits",
    "logit_scale": "it scales logits",
    "logits_scaling": "it scales logits",
    "attention_chunk_size": "it attends in chunks",
}
NEUTRAL_VALUES = (None, 0, 1)


def fastrl_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, fastrl_state: Attention, scaling: float | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **_: Any,
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

    def train(self, mode: bool = True) -> "HFBackbone":
        """Sets the flag of this module only."""
        self.training = mode
        return self

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """[N, D], final norm applied; see `CausalLM.forward`."""
        out = self.model(input_ids=token_ids[None], position_ids=positions[None], use_cache=False,
                         fastrl_state=attention)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


def load_causal_lm(
    path: str | Path, raw: Mapping[str, Any], dtype: torch.dtype, device: torch.device | str
) -> CausalLM:
    """`fastrl.models.weights.load_causal_lm` for architectures that run through transformers."""
    from transformers import AutoModelForCausalLM

    full = _load(AutoModelForCausalLM, path, raw, dtype).to(device)
    unembedding = full.get_output_embeddings()
    head = LMHead(unembedding.weight, getattr(unembedding, "bias", None))
    backbone = HFBackbone(getattr(full, full.base_model_prefix))
    spec = _probe(full, backbone, lambda hidden: head(hidden, F.linear), path)
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
    own_bias = 0.0 if score.bias is None else float(score.bias)
    head = ScalarHead(nn.Parameter(score.weight.detach()[0]), own_bias + bias)
    backbone = HFBackbone(getattr(full, full.base_model_prefix))
    spec = _probe(full, backbone, lambda hidden: (head(hidden) - bias)[:, None], path)
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

    full = _shell(AutoModelForSequenceClassification, model.backbone, extra)
    full.score.weight = nn.Parameter(model.head.weight.detach()[None])
    if full.score.bias is not None:  # the shift holds it: see load_scalar_model
        full.score.bias = nn.Parameter(torch.zeros(1))
    full.save_pretrained(target, max_shard_size=max_shard_bytes)


def _shell(auto_class: Any, backbone: nn.Module, extra: Mapping[str, Any] | None = None) -> Any:
    """A transformers model without weights of its own around a trunk."""
    assert isinstance(backbone, HFBackbone)
    config: Any = backbone.model.config
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
    if isinstance(value, dict):
        return {k: _without_private_keys(v) for k, v in value.items()
                if not k.startswith("_") and k not in ("auto_map", "attn_implementation")}
    return value


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
        raise ModelError(f"{path}: expected an architecture of transformers' own, got model_type "
                         f"{model_type!r} ({error}); code inside a checkpoint is never run") from error
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


class _Recorder:
    """An attention state that notes what the layers ask for."""

    def __init__(self, inner: Attention) -> None:
        self.inner = inner
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int]] = set()
        self.num_windows = 0

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, *, scale: float,
        window: int | None = None,
    ) -> Tensor:
        self.layers.append(layer)
        self.shapes.add((query.shape[1], key.shape[1], query.shape[2]))
        self.num_windows += window is not None
        return self.inner(layer, query, key, value, scale=scale, window=window)


@torch.no_grad()
def _probe(
    full: Any, backbone: HFBackbone, head: Callable[[Tensor], Tensor], path: str | Path
) -> ModelSpec:
    """Sizes of a model, after two packed sequences agreed with transformers' own forward."""
    config = full.config
    vocab_size = full.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(vocab_size, 64)) if i != config.pad_token_id]
    sequences = [[ids[(i * 7 + shift) % len(ids)] for i in range(length)]
                 for shift, length in ((1, 5), (3, 3))]
    batch = pack_sequences(sequences, full.device)
    recorder = _Recorder(PackedAttention(batch.cu_seqlens, batch.max_seqlen))
    ours = head(backbone(batch.token_ids, batch.positions, recorder)[batch.cu_seqlens[1:] - 1])
    full.set_attn_implementation("eager")
    theirs = torch.stack([
        full(input_ids=torch.tensor([s], device=full.device), use_cache=False).logits[0, ..., :]
        .reshape(-1, ours.shape[-1])[-1] for s in sequences])
    full.set_attn_implementation(ATTENTION_NAME)
    gap = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))
    if gap > PROBE_TOLERANCE[full.dtype]:
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: its "
                         f"logits differ from transformers' by {gap:.1e} of the largest one; use "
                         "another model")
    num_layers, shapes = config.num_hidden_layers, recorder.shapes
    sliding = [t for t in getattr(config, "layer_types", None) or () if t == "sliding_attention"]
    if (sorted(recorder.layers) != list(range(num_layers)) or len(shapes) != 1
            or recorder.num_windows < len(sliding)):
        raise ModelError(f"{path}: fastrl cannot run the architecture {config.model_type}: its "
                         f"{num_layers} layers made {len(recorder.layers)} attention calls with "
                         f"{len(shapes)} shapes and {recorder.num_windows} windows; use another "
                         "model")
    return _spec(config, vocab_size, backbone, *next(iter(shapes)))


def _spec(
    config: Any, vocab_size: int, backbone: HFBackbone, num_heads: int, num_kv_heads: int,
    head_dim: int,
) -> ModelSpec:
    eos = config.eos_token_id
    # Past its original length `longrope` turns to other frequencies for the whole batch at once.
    rotary = getattr(config, "rope_parameters", None) or {}
    longest = config.max_position_embeddings
    if rotary.get("rope_type") == "longrope":
        longest = rotary.get("original_max_position_embeddings", longest)
    return ModelSpec(
        architecture=config.model_type, num_layers=config.num_hidden_layers, num_heads=num_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, hidden_size=config.hidden_size,
        vocab_size=vocab_size, max_positions=longest,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )
