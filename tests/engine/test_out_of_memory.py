"""Allocations that fail in a rollout: fewer pages and sequences at a time, the same responses."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.engine.cache import KVCache
from fastrl.errors import ConfigError, DeviceMemoryError
from fastrl.memory.arena import Arena
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.types import Rollout

CONFIG = DecoderConfig(
    family="qwen2", vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=8, rotary_dim=8, max_positions=64, initializer_range=0.5)
PROMPTS = [[3, 9, 4], [7, 1], [5, 5, 5, 5]]
SAMPLING = SamplingConfig(max_new_tokens=4, stop_token_ids=(1, 2))
FIELDS = ("token_ids", "cu_seqlens", "response_ids", "response_mask", "rollout_logprobs",
          "entropy")
FailingAllocations: Any = runpy.run_path(
    str(Path(__file__).parents[1] / "failing_allocations.py"))["FailingAllocations"]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    return new_decoder(CONFIG, 3)


def _generate(model: CausalLM, **sizes: Any) -> Rollout:
    return Engine(model, EngineConfig(**sizes)).generate(
        PROMPTS, SAMPLING, seed=2, num_samples_per_prompt=2)


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


SIZES = {"roomy": {}, "short": {"num_pages": 8, "page_size": 4, "max_batch_size": 3,
                                "sync_every": 2}}


def _failures(model: CausalLM, sizes: dict[str, Any], stride: int,
              prompts: list[list[int]] = PROMPTS, sampling: SamplingConfig = SAMPLING) -> None:
    """One allocation in `stride` fails, each in a call of its own; responses keep their bits."""
    def call(failing: Any) -> Rollout:
        engine = Engine(model, EngineConfig(**sizes))
        with failing:
            return engine.generate(prompts, sampling, seed=2, num_samples_per_prompt=2)

    counted = FailingAllocations(lambda number: False)
    expected = call(counted)
    assert counted.count > 1000
    for n in sorted({*range(0, counted.count, stride), counted.count - 20}):
        failing = FailingAllocations.at(n)
        got = call(failing)
        assert failing.count > n
        _assert_same_bits(expected, got)


@pytest.mark.parametrize("kind, stride", [("roomy", 83), ("short", 191)])
def test_allocations_of_a_call_may_fail(
    model: CausalLM, kind: str, stride: int, pages_checked_after_every_step: None
) -> None:
    _failures(model, SIZES[kind], stride)


@pytest.mark.exhaustive  # minutes
def test_every_allocation_of_a_call_with_too_few_pages_may_fail(
    model: CausalLM, pages_checked_after_every_step: None
) -> None:
    """With enough pages: tests/trainers/test_every_allocation.py."""
    _failures(model, SIZES["short"] | {"num_pages": 4}, 1, PROMPTS[:2],
              SamplingConfig(max_new_tokens=3, stop_token_ids=()))


def test_cancelling_takes_no_memory(model: CausalLM) -> None:
    """So that nothing fails where a caller ends responses; the next step drops their rows."""
    expected, engine, counts = _generate(model), Engine(model), list[int]()

    def cancel(num_tokens: int, num_finished: int, total: int) -> None:
        if not counts and num_tokens > 6:
            with FailingAllocations(lambda number: False) as counted:
                engine.cancel([0, 3])
            counts.append(counted.count)

    got = engine.generate(PROMPTS, SAMPLING, seed=2, num_samples_per_prompt=2, on_progress=cancel)
    assert counts == [0] and [got.finish_reasons[row] for row in (0, 3)] == ["cancelled"] * 2
    for row in (1, 2, 4, 5):
        assert got.response(row) == expected.response(row)


def test_any_allocation_of_new_weights_within_a_call_may_fail(model: CausalLM) -> None:
    def call(n: int) -> tuple[Rollout, int]:
        """A call in whose midst new weights are told of; allocation n of that fails."""
        engine, counts = Engine(model), list[int]()

        def change(num_tokens: int, num_finished: int, total: int) -> None:
            if not counts:
                with FailingAllocations(lambda number: number == n) as failing:
                    engine.weights_changed()
                counts.append(failing.count)

        return engine.generate(PROMPTS, SAMPLING, seed=2, num_samples_per_prompt=2,
                               on_progress=change), counts[0]

    expected, count = call(-1)
    assert count > 5
    for n in range(count):
        _assert_same_bits(expected, call(n)[0])


def test_what_was_lowered_stays_lowered(
    model: CausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(model)
    expected = engine.generate(PROMPTS, SAMPLING, seed=2, num_samples_per_prompt=2)
    with FailingAllocations(lambda number: number == 700):
        engine.generate(PROMPTS, SAMPLING, seed=2, num_samples_per_prompt=2)
    lines = [r.message for r in caplog.records if "no memory for a pass" in r.message]
    assert len(lines) == 1 and "at most 3 sequences at a time and 3 pages" in lines[0]
    assert engine._max_batch_size == 3 and engine._idle_cache is not None
    assert engine._idle_cache.num_pages == 3
    _assert_same_bits(expected, engine.generate(PROMPTS, SAMPLING, seed=2,
                                                num_samples_per_prompt=2))
    assert engine._idle_cache is not None and engine._idle_cache.num_pages == 3


def test_memory_that_is_always_short_is_an_error_that_says_what_to_do(model: CausalLM) -> None:
    engine = Engine(model)
    with (FailingAllocations(lambda number: number > 600),
          pytest.raises(DeviceMemoryError, match="at least one sequence at a time, got none beside "
                                                 "1 pages .* lower num_pages, max_new_tokens")):
        engine.generate(PROMPTS, SAMPLING)


def _memory_for(monkeypatch: pytest.MonkeyPatch, num_pages: int) -> list[int]:
    """Every arena refuses to map more than `num_pages` pages of the model; sizes asked for."""
    asked, mapped = [], Arena.map

    def short(self: Arena, num_bytes: int | None = None) -> None:
        size = self.num_bytes if num_bytes is None else num_bytes
        if not self.is_mapped:
            asked.append(size)
            if size > num_pages * PAGE_BYTES:
                raise torch.OutOfMemoryError(f"arena: no {size} bytes")
        mapped(self, num_bytes)

    monkeypatch.setattr(Arena, "map", short)
    return asked


PAGE_BYTES = 2 * 4 * 8 * 4  # keys and values of 4 tokens, 8 channels, float32


def test_pages_are_halved_until_there_is_memory(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _generate(model, page_size=4)
    asked = _memory_for(monkeypatch, 4)
    engine = Engine(model, EngineConfig(page_size=4))
    for _ in range(2):
        _assert_same_bits(expected, engine.generate(PROMPTS, SAMPLING, seed=2,
                                                    num_samples_per_prompt=2))
        engine.release_memory()
    assert [size // PAGE_BYTES for size in asked] == [12, 6, 3, 3]
    lines = [r.message for r in caplog.records if "num_pages: no memory" in r.message]
    assert len(lines) == 1 and "for 12 pages of 4 tokens; going on with 3" in lines[0]


def test_no_memory_for_one_sequence_is_an_error_with_the_size(
    model: CausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    _memory_for(monkeypatch, 1)
    with pytest.raises(ConfigError, match="num_pages: .* got 2 pages of 4 tokens, 0.0 GiB; lower"):
        _generate(model, page_size=4)


def test_released_memory_is_back_at_the_same_addresses(model: CausalLM) -> None:
    engine = Engine(model)
    expected = engine.generate(PROMPTS, SAMPLING, seed=2)
    cache = engine._idle_cache
    assert cache is not None and cache.kv_pages.any()
    address = cache.kv_pages.data_ptr()
    for release in (engine.release_memory, engine.weights_changed):
        release()
        assert not cache.arena.is_mapped
        _assert_same_bits(expected, engine.generate(PROMPTS, SAMPLING, seed=2))
        assert engine._idle_cache is cache and cache.kv_pages.data_ptr() == address


def test_a_cache_in_use_keeps_its_memory() -> None:
    cache = KVCache(new_decoder(CONFIG, 3).spec, 4, 4, torch.float32, torch.device("cpu"))
    pages = cache.allocate(1)
    with pytest.raises(AssertionError, match="pages are in use"):
        cache.unmap()
    cache.release(pages)
    cache.shrink(2)
    assert cache.num_pages == cache.num_free == 2 and cache.has_shrunk
    assert len(cache.kv_pages) == 4
