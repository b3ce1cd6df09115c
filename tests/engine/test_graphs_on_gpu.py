"""Decode steps on a GPU: captured or not they give the same bits, and nobody waits inside one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, prefixes
from fastrl.engine.flags import Flags
from fastrl.engine.graphs import refusal
from fastrl.engine.step import DeviceStep
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.types import Rollout

pytestmark = pytest.mark.gpu
CONFIG = DecoderConfig(
    family="qwen3", vocab_size=512, hidden_size=256, intermediate_size=512, num_layers=3,
    num_heads=4, num_kv_heads=2, head_dim=64, rotary_dim=64, qk_norm=True, max_positions=512,
    initializer_range=0.2)
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [5, 5, 5, 5], [8] * 16, [50, 2, 11, 44, 1]]
KINDS = {
    "plain": SamplingConfig(max_new_tokens=40, stop_token_ids=tuple(range(8))),
    "greedy": SamplingConfig(max_new_tokens=40, greedy=True, stop_token_ids=tuple(range(8))),
    "truncated": SamplingConfig(max_new_tokens=40, top_k=50, top_p=0.9, stop_token_ids=(0, 1)),
    "penalty": SamplingConfig(max_new_tokens=40, repetition_penalty=1.2, min_new_tokens=3,
                              stop_token_ids=tuple(range(60))),
}


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def model(request: pytest.FixtureRequest) -> CausalLM:
    """A small model on the GPU; skips where there is none, or no kernel for an op of the step."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = new_decoder(CONFIG, 0, dtype=request.param, device="cuda")
    reason = refusal(model)
    if reason is not None:
        pytest.skip(f"decode steps run eagerly here: {reason}")
    return model


def _generate(model: CausalLM, kind: str, **sizes: Any) -> Rollout:
    return Engine(model, EngineConfig(**sizes)).generate(
        PROMPTS, KINDS[kind], seed=1, num_samples_per_prompt=5)


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in ("token_ids", "response_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_gives_the_bits_of_an_eager_one(model: CausalLM, kind: str) -> None:
    eager = _generate(model, kind, cuda_graphs="off")
    _assert_same_bits(eager, _generate(model, kind, cuda_graphs="on"))
    _assert_same_bits(eager, _generate(model, kind, cuda_graphs="off", sync_every=1))
    _assert_same_bits(eager, _generate(model, kind, cuda_graphs="on", sync_every=3))


def test_samples_read_shared_pages_once_with_the_same_bits(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of several blocks of keys, some samples of which end early."""
    prompts = [list(range(2, 302)), [9] * 130, [5] * 40]
    rollouts = []
    for least in (0, 2**60):
        monkeypatch.setattr(prefixes, "MIN_SAVED_BYTES", least)
        for graphs in ("on", "off"):
            engine = Engine(model, EngineConfig(cuda_graphs=graphs))  # type: ignore[arg-type]
            rollouts.append(engine.generate(prompts, KINDS["plain"], num_samples_per_prompt=18))
            if engine._graphs is not None:
                assert any(key.has_groups for key in engine._graphs.capture_s) == (least == 0)
    for other in rollouts[1:]:
        _assert_same_bits(rollouts[0], other)


def test_new_weights_need_no_new_graph(model: CausalLM) -> None:
    engine = Engine(model, EngineConfig(cuda_graphs="on"))
    first = engine.generate(PROMPTS, KINDS["plain"])
    graphs = engine._graphs
    assert graphs is not None
    captured = dict(graphs.capture_s)
    other = new_decoder(CONFIG, 1, dtype=model.lm_head.weight.dtype, device="cuda")
    model.load_state_dict(other.state_dict())
    engine.weights_changed()
    second = engine.generate(PROMPTS, KINDS["plain"])
    assert engine._graphs is graphs and graphs.capture_s == captured
    assert not torch.equal(first.response_ids[:, :4], second.response_ids[:, :4])
    _assert_same_bits(second, Engine(other, EngineConfig(cuda_graphs="off")).generate(
        PROMPTS, KINDS["plain"]))


def test_graphs_live_on_while_the_memory_of_the_pages_is_away(model: CausalLM) -> None:
    engine = Engine(model, EngineConfig(cuda_graphs="on"))
    first = engine.generate(PROMPTS, KINDS["plain"])
    graphs, cache = engine._graphs, engine._idle_cache
    assert graphs is not None and cache is not None
    if not cache.arena.keeps_addresses:
        pytest.skip("needs the extension and virtual memory management")
    captured, free = dict(graphs.capture_s), torch.cuda.mem_get_info()[0]
    engine.release_memory()
    assert torch.cuda.mem_get_info()[0] - free >= cache.num_pages * cache.page_bytes
    taken = torch.full((cache.num_pages * cache.page_bytes,), 255, dtype=torch.uint8,
                       device="cuda")
    del taken  # NaN where the pages may come to lie
    torch.cuda.empty_cache()
    _assert_same_bits(first, engine.generate(PROMPTS, KINDS["plain"]))
    assert engine._graphs is graphs and graphs.capture_s == captured


@contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_waits_inside_a_step(
    model: CausalLM, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generate(model, kind, cuda_graphs="off")  # kernels are compiled
    decode, steps = DeviceStep.decode, []

    def watched(self: DeviceStep, *arguments: Any, **keywords: Any) -> None:
        with _waiting_is_an_error():
            decode(self, *arguments, **keywords)
        steps.append(1)

    monkeypatch.setattr(DeviceStep, "decode", watched)
    _generate(model, kind, cuda_graphs="off")
    assert len(steps) >= 8


def test_the_host_looks_once_in_eight_steps(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    read = Flags.read
    monkeypatch.setattr(Flags, "read", lambda self: looks.append(1) or read(self))
    Engine(model).generate(PROMPTS, SamplingConfig(max_new_tokens=65, stop_token_ids=()))
    assert len(looks) <= 1 + 64 // 8 + 1
