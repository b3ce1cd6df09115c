"""The first part of a model whose results differ between the engine's passes and a packed pass.

P tokens of the prompt, T of the response, N = P + T - 1 tokens that are fed, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.config import SamplingConfig
from fastrl.engine.engine import Engine
from fastrl.exactness import exact_math
from fastrl.models import CausalLM, PackedAttention
from fastrl.models.decoder import Decoder, DecoderLayer
from fastrl.ops import linear_logprobs
from fastrl.packing import pack_sequences

NOWHERE = "no part when drawn again (were weights changed without engine.weights_changed()?)"


def first_difference(
    engine: Engine, model: CausalLM, prompt_ids: Sequence[int], sampling: SamplingConfig, *,
    tolerance: float, seed: int, request_id: int,
) -> str:
    """Where the engine and a packed pass part: "embedding", "layer 3 attention", "lm_head".

    The response is drawn once more by the engine's own passes, eagerly, and read once by `model`.

    Args:
        engine: Its model, settings and encoder are used; its pages and graphs are left alone.
        model: What the update trains; has the structure of the engine's model.
        prompt_ids: P token ids.
        sampling, seed, request_id: Of the response.
        tolerance: Accepted difference, of log-probs, and of states in units of their largest value.
    Returns:
        The name, for a warning; where no part differs by more than `tolerance` and the log-probs
        do, where rounding begins.
    """
    probe = Engine(engine.model, replace(engine.config, cuda_graphs="off"), engine.encoder)
    weight = model.lm_head.weight
    with _recorded(engine.model) as drawn:
        rollout = probe.generate([prompt_ids], sampling, seed=seed, first_request_id=request_id)
    packed = pack_sequences([rollout.sequence(0)], weight.device)
    num_prompt, num_fed = len(prompt_ids), len(packed.token_ids) - 1
    with _recorded(model) as read, torch.no_grad(), exact_math(
            weight.device.type, is_exact=engine.config.exact):
        hidden = model(packed.token_ids, packed.positions,
                       PackedAttention(packed.cu_seqlens, packed.max_seqlen))
        logprobs, _ = model.lm_head(
            hidden[num_prompt - 1 : num_fed], linear_logprobs, packed.token_ids[num_prompt:],
            temperature=sampling.temperature)
    begin = None
    for name in read:
        # The prompt is one pass, every token of the response but the last another, in row 0.
        first, *steps = drawn[name]
        states = torch.cat([first[:num_prompt], *(step[:1] for step in steps)])[:num_fed]
        expected = read[name][0][:num_fed]
        gap = _largest(states - expected)
        if not gap <= tolerance * _largest(expected):
            return name
        begin = name if begin is None and gap > 0 else begin
    if _largest(logprobs.float() - rollout.rollout_logprobs[0]) <= tolerance:
        return NOWHERE
    return "lm_head" if begin is None else f"rounding, which begins in {begin}"


def parts(model: CausalLM) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of what is compared, in the order of a pass."""
    backbone = model.backbone
    if not isinstance(backbone, Decoder):
        yield "hidden states", backbone
        return
    yield "embedding", backbone.embed
    if backbone.embed_positions is not None:
        yield "position embedding", backbone.embed_positions
    for number, layer in enumerate(backbone.layers):
        assert isinstance(layer, DecoderLayer)
        yield f"layer {number} attention", layer.attention
        yield f"layer {number} mlp", layer.mlp
    yield "final norm", backbone.final_norm


@contextmanager
def _recorded(model: CausalLM) -> Iterator[dict[str, list[Tensor]]]:
    """What every part gives inside the block, pass by pass: [rows, D] each."""
    states: dict[str, list[Tensor]] = {name: [] for name, _ in parts(model)}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            result = output[0] if isinstance(output, tuple) else output
            states[name].append(result.detach().clone())
        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in parts(model)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
