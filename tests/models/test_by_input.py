"""Copies of a small model's matrices that one call of the engine multiplies with."""

import gc
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrl.config import SamplingConfig
from fastrl.engine import Engine
from fastrl.exactness import multiplies_by_input
from fastrl.models import CausalLM, DecoderConfig, by_input, new_decoder
from fastrl.models.by_input import WeightsByInput, matrices

SAMPLING = SamplingConfig(max_new_tokens=8, stop_token_ids=())


@pytest.fixture
def model() -> CausalLM:
    return new_decoder(DecoderConfig(
        family="llama", num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, max_positions=64,
        rotary_dim=6, vocab_size=70, hidden_size=24, intermediate_size=40, tie_embeddings=True), 0)


def _watch(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights of all products from now on."""
    seen: list[Tensor] = []

    def recording(plain: Callable[..., Tensor], turn: bool) -> Callable[..., Tensor]:
        def call(x: Tensor, weight: Tensor, *args: Tensor, **kwargs: Tensor) -> Tensor:
            seen.append(weight.t() if turn else weight)
            return plain(x, weight, *args, **kwargs)
        return call

    monkeypatch.setattr(F, "linear", recording(F.linear, False))
    monkeypatch.setattr(torch, "mm", recording(torch.mm, True))
    return seen


def test_products_take_copies_in_a_call_and_the_weights_are_back_after_it(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: parameter for name, parameter in model.named_parameters()}
    engine, seen = Engine(model), _watch(monkeypatch)
    engine.generate([[1, 2]], SAMPLING)
    assert len(seen) >= 8 * len(matrices(model)) and all(w.stride(0) == 1 for w in seen)
    after = dict(model.named_parameters())
    assert after.keys() == own.keys() and all(after[name] is own[name] for name in own)
    assert model.lm_head.weight is model.get_parameter("backbone.embed.weight")


@pytest.mark.parametrize(("outputs", "num_threads", "columns"), [
    (32000, 1, 320), (32000, 2, 3200), (128256, 1, 256), (50257, 1, 0), (112, 1, 0), (128, 2, 128)])
def test_tiles_divide_the_head(
    monkeypatch: pytest.MonkeyPatch, outputs: int, num_threads: int, columns: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert by_input.tile_columns(outputs) == columns


def test_tiles_give_the_responses_that_the_weights_give(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = new_decoder(replace(model.backbone.config, vocab_size=640), 0)
    prompts = [[i, 600 + i] for i in range(9)]
    with monkeypatch.context() as context:
        seen = _watch(context)
        rollout = Engine(model).generate(prompts, SAMPLING)
    assert sum(tuple(w.shape) == (320, 24) for w in seen) >= 2 * 8  # outputs, inputs of a tile
    monkeypatch.setattr(by_input, "tile_columns", lambda outputs: 0)
    plain = Engine(model).generate(prompts, SAMPLING)
    assert torch.equal(rollout.response_ids, plain.response_ids)
    assert torch.equal(rollout.rollout_logprobs, plain.rollout_logprobs)
    assert len(rollout.response_ids.unique()) > 20


def test_copies_are_dropped_at_the_end_of_a_call(model: CausalLM) -> None:
    engine = Engine(model)
    engine.generate([[1, 2]], SAMPLING)
    gc.collect()
    held = [o for o in gc.get_objects() if isinstance(o, nn.Parameter) and o.dim() == 2
            and o.shape in {w.weight.shape for w in matrices(model)} and o.stride(0) == 1]
    assert not held and not [o for o in gc.get_objects()
                             if isinstance(o, nn.Parameter) and o.dim() == 3]


def test_the_weights_are_back_when_a_step_fails(model: CausalLM) -> None:
    own = model.lm_head.weight
    with pytest.raises(RuntimeError, match="stop"), WeightsByInput(matrices(model)).in_use():
        assert model.lm_head.weight is not own
        raise RuntimeError("stop")
    assert model.lm_head.weight is own


def test_a_stream_takes_new_weights_when_it_is_told_of_them(model: CausalLM) -> None:
    engine = Engine(model)
    stream = engine.stream([1, 2], replace(SAMPLING, max_new_tokens=6))
    tokens = [next(stream), next(stream)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    engine.weights_changed()
    tokens += stream
    begun = [1, 2, *(token.token_id for token in tokens[:2])]
    fresh = Engine(model).generate([begun], replace(SAMPLING, max_new_tokens=4))
    assert [token.token_id for token in tokens[2:]] == fresh.response(0)
    torch.testing.assert_close(torch.tensor([token.logprob for token in tokens[2:]]),
                               fresh.rollout_logprobs[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", ["large", "bfloat16"])
def test_other_models_are_used_as_they_are_stored(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    assert multiplies_by_input(model)
    if change == "large":
        total = sum(module.weight.numel() * 4 for module in matrices(model))
        monkeypatch.setattr(by_input, "MAX_COPY_BYTES", total - 1)
    else:
        model.bfloat16()
    assert not multiplies_by_input(model)
    engine, seen = Engine(model), _watch(monkeypatch)
    engine.generate([[1, 2]], SAMPLING)
    assert seen and not any(w.stride(0) == 1 for w in seen)
