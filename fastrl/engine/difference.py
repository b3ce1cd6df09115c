"""The first part of a model whose results differ between the engine's passes and a packed pass.

P tokens of the prompt, T of the response, N = P + T - 1 tokens that are fed, D width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.config import SamplingConfig
from fastrl.engine.engine import Engine
from fastrl.exactness import exact_math
from fastrl.memory.pages import PAGE_SIZE
from fastrl.models import CausalLM, PackedAttention
from fastrl.models.decoder import Decoder, DecoderLayer
from fastrl.ops import linear_logprobs
from fastrl.packing import pack_sequences

NUM_LAST_PARTS = 3
"""The last of `parts`, which a pass over prompts computes for last tokens alone: a decoder's last
layer and norm; of another model the only one."""
NOWHERE = "no part when drawn again (were weights changed without engine.weights_changed()?)"


def first_difference(
    engine: Engine, model: CausalLM, prompt_ids: Sequence[int], sampling: SamplingConfig, *,
    tolerance: float, seed: int, request_id: int, num_samples: int = 1, share_prefix: bool = True,
) -> str:
    """Where the engine and a packed pass part: "embedding", "layer 3 attention", "lm_head".

    The response is drawn once more by the engine's own passes, eagerly, and read once by `model`:
    alone, and where that shows nothing, beside others to its prompt.

    Args:
        engine: Its model, settings and encoder are used; its pages and graphs are left alone.
        model: What the update trains; has the structure of the engine's model.
        prompt_ids: P token ids.
        sampling, seed, request_id: Of the response.
        tolerance: Accepted difference, of log-probs, and of states in units of their largest value.
        num_samples: Responses to the prompt, which the engine reads once for all where it can.
        share_prefix: The packed pass encodes the prompt of several responses once.
    Returns:
        The name, for a warning; where no part differs by more than `tolerance` and the log-probs
        do, where rounding begins.
    """
    find = partial(_difference, engine, model, prompt_ids, sampling, tolerance, seed, request_id)
    place = find(1, False)
    if place != NOWHERE or num_samples == 1:
        return place
    place = find(min(num_samples, engine.config.max_batch_size), share_prefix)
    return place if place == NOWHERE else f"{place}, with a prompt that others share"


def _difference(
    engine: Engine, model: CausalLM, prompt_ids: Sequence[int], sampling: SamplingConfig,
    tolerance: float, seed: int, request_id: int, num_samples: int, share_prefix: bool,
) -> str:
    """As `first_difference`, of the first of `num_samples` responses, all of them in one batch."""
    weight, num_prompt = model.lm_head.weight, len(prompt_ids)
    with _recorded(engine.model) as drawn:
        rollout = _probe(engine, num_samples).generate(
            [prompt_ids], sampling, seed=seed, first_request_id=request_id,
            num_samples_per_prompt=num_samples)
    packed = pack_sequences([rollout.sequence(i) for i in range(num_samples)], weight.device,
                            prompt_lens=[num_prompt] * num_samples, share_prefix=share_prefix)
    num_steps = len(rollout.sequence(0)) - num_prompt
    begin = int(packed.ends[0]) - num_steps + 1
    response = torch.arange(begin, begin + num_steps, device=weight.device)
    fed = torch.cat([torch.arange(num_prompt, device=weight.device), response[:-1]])
    with _recorded(model) as read, torch.no_grad(), exact_math(
            weight.device.type, is_exact=engine.config.exact):
        hidden = model(packed.token_ids, packed.positions, PackedAttention.of(packed))
        logprobs, _ = model.lm_head(hidden[fed[num_prompt - 1 :]], linear_logprobs,
                                    packed.token_ids[response], temperature=sampling.temperature)
    rounding = None
    for name in read:
        # The prompt is one pass, of whose last parts the last token is row 0; every token of the
        # response but the last is another, in row 0.
        first, *steps = drawn[name]
        skipped = num_prompt - 1 if name in list(read)[-NUM_LAST_PARTS:] else 0
        states = torch.cat([first[: num_prompt - skipped], *(step[:1] for step in steps)])
        states, expected = states[: len(fed) - skipped], read[name][0][fed[skipped:]]
        gap = _largest(states - expected)
        if not gap <= tolerance * _largest(expected):
            return name
        rounding = name if rounding is None and gap > 0 else rounding
    if _largest(logprobs.float() - rollout.rollout_logprobs[0, :num_steps]) <= tolerance:
        return NOWHERE
    return "lm_head" if rounding is None else f"rounding, which begins in {rounding}"


def _probe(engine: Engine, num_samples: int) -> Engine:
    """An engine of the same settings and path, with memory enough that nothing is preempted."""
    config = replace(engine.config, cuda_graphs="off")
    if num_samples > 1 and config.num_pages is not None:
        config = replace(config, num_pages=None, page_size=config.page_size or PAGE_SIZE)
    probe = Engine(engine.model, config, engine.encoder)
    probe.sharing_must_pay = False
    return probe


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
