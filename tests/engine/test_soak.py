"""Thousands of random requests through one engine: no page is lost, and memory stays flat."""

import gc
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation
from fastrl.models import load_causal_lm

NUM_REQUESTS = 5000
CALLS = 50
WARM_CALLS = 10
"""Calls after which whatever grows only once has grown."""
MAX_GROWTH_BYTES = 8 * 2**20


class Letters:
    """Token id -> a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def _sampling(rng: random.Random) -> SamplingConfig:
    num_tokens = rng.randint(1, 8)
    return SamplingConfig(
        max_new_tokens=num_tokens, temperature=rng.choice([0.7, 1.0, 1.5]),
        top_k=rng.choice([0, 0, 20]), top_p=rng.choice([1.0, 1.0, 0.9]),
        greedy=rng.random() < 0.2, repetition_penalty=rng.choice([1.0, 1.0, 1.2]),
        min_new_tokens=rng.randint(0, min(2, num_tokens)),
        stop_token_ids=tuple(range(rng.choice([1, 60]))),
        stop_strings=("e",) if rng.random() < 0.02 else ())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def _is_empty(engine: Engine, num_active: int) -> bool:
    """Nothing runs but `num_active` calls, and all pages of the idle cache are free."""
    cache = engine._idle_cache
    return (len(engine._active) == num_active and cache is not None
            and cache.num_free == cache.num_pages)


@pytest.mark.slow
def test_five_thousand_requests_leak_nothing(
    required_shared: Path, monkeypatch: pytest.MonkeyPatch, preemptions: list[int]
) -> None:
    model = load_causal_lm(required_shared / "models" / "stories260k")
    rng = random.Random(0)
    engine = Engine(model, encoder=Letters())
    reasons: list[str] = []
    measured: list[tuple[int, int]] = []
    for call in range(CALLS):
        monkeypatch.setitem(generation.ROUNDS_BEHIND, "cpu", call % 2)
        num_samples = rng.choice([1, 2, 5])
        count = NUM_REQUESTS // CALLS // num_samples
        prompts = [[rng.randrange(3, 512) for _ in range(rng.randint(1, 20))]
                   for _ in range(count)]
        engine.config = EngineConfig(
            page_size=4, num_pages=rng.choice([40, 160]), max_batch_size=rng.choice([20, 48]),
            sync_every=rng.choice([1, 2, 8]), share_prefix=rng.random() < 0.8)
        act = rng.choice([engine.cancel, engine.weights_changed, None, None, None, None])
        acts = [act] if act else []

        def interfere(
            drawn: int, finished: int, total: int, acts: list[Callable[[], None]] = acts
        ) -> None:
            if acts and finished > total // 2:
                acts.pop()()

        stream = engine.stream(prompts[0], _sampling(rng))
        next(stream)  # a second generation on the way, with a cache of its own
        rollout = engine.generate(prompts, [_sampling(rng) for _ in prompts], seed=call,
                                  num_samples_per_prompt=num_samples, on_progress=interfere)
        reasons += rollout.finish_reasons
        assert _is_empty(engine, 1)
        stream.close()
        assert _is_empty(engine, 0)
        if call in (WARM_CALLS, CALLS - 1):
            del rollout
            measured.append((_num_tensors(), _resident_bytes()))
    assert len(reasons) >= NUM_REQUESTS * 0.99 and len(preemptions) > 100
    assert min(reasons.count(reason) for reason in ("stop", "length", "cancelled")) > 50
    (tensors_before, bytes_before), (tensors_after, bytes_after) = measured
    assert tensors_after == tensors_before
    assert bytes_after - bytes_before < MAX_GROWTH_BYTES
