"""Who starts when: order, the bound on waiting, and what a page holds."""

import random
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import dense_attention
from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation
from fastrl.engine.cache import KVCache, pages_for
from fastrl.engine.generation import Generation
from fastrl.engine.request import Request, SharedPrompt
from fastrl.engine.scheduler import Scheduler, starting_order
from fastrl.models import DecoderConfig, ModelSpec, new_decoder

SPEC = ModelSpec(architecture="llama", num_layers=1, num_heads=1, num_kv_heads=1, head_dim=1,
                 hidden_size=1, vocab_size=2, max_positions=512, eos_token_ids=())


def _requests(lengths: list[tuple[int, int]]) -> list[Request]:
    """One request for each (prompt tokens, max tokens)."""
    return [Request(i, SharedPrompt((0,) * prompt, 1), i, new, SamplingConfig(max_new_tokens=new))
            for i, (prompt, new) in enumerate(lengths)]


@pytest.mark.parametrize("seed", range(60))
def test_waiting_is_bounded_by_those_ahead(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [(rng.randint(1, 12), rng.randint(1, 15)) for _ in range(rng.randint(2, 14))]
    requests, page_size = _requests(lengths), rng.choice([1, 2, 4, 32])
    needed = max(pages_for(r.max_cached_tokens, page_size) for r in requests)
    cache = KVCache(SPEC, needed + rng.randint(0, 6), page_size, torch.float32,
                    torch.device("cpu"))
    scheduler = Scheduler(requests, cache, EngineConfig(
        max_batch_size=rng.randint(1, 8), max_prefill_tokens=rng.randint(1, 30)))
    first_start: dict[int, int] = {}
    step = 0
    # What a generation does, without a model: a request that starts has its first token.
    while scheduler.waiting or scheduler.running:
        started = scheduler.admit(step).started
        for request in started:
            first_start.setdefault(request.index, step)
        if not started:
            scheduler.grow(step)
            scheduler.number_rows()
            step += 1
        scheduler.finish([request for request in scheduler.running
                          if step - request.started + 1 >= request.max_tokens])
        scheduler.number_rows()
        scheduler.check()
    assert sorted(first_start) == list(range(len(requests)))
    starts = [first_start[i] for i in range(len(requests))]
    assert starts == sorted(starts)
    bounds = accumulate((new - 1 for _, new in lengths), initial=0)
    assert all(start <= bound for start, bound in zip(starts, bounds, strict=False))
    assert step <= sum(new - 1 for _, new in lengths)
    assert cache.num_free == cache.num_pages


def test_a_page_that_a_running_request_may_need_next_starts_nobody() -> None:
    cache = KVCache(SPEC, 4, 4, torch.float32, torch.device("cpu"))
    scheduler = Scheduler(_requests([(8, 3), (8, 1)]), cache, EngineConfig())
    assert [r.index for r in scheduler.admit(0).started] == [0]  # two pages, and soon a third
    assert cache.num_free == 2 and not scheduler.admit(0).started
    # Without such a need it starts: the first page of the other is the last that it will have.
    scheduler = Scheduler(_requests([(7, 2), (8, 1)]), KVCache(
        SPEC, 4, 4, torch.float32, torch.device("cpu")), EngineConfig())
    assert [r.index for r in scheduler.admit(0).started] == [0, 1]


def test_longest_first_keeps_the_samples_of_a_prompt_together() -> None:
    requests = _requests([(1, 3), (1, 9), (1, 9), (1, 4)])
    assert [r.index for r in starting_order(requests, "longest_first")] == [1, 2, 3, 0]
    assert starting_order(requests, "given") is requests


MODEL = new_decoder(DecoderConfig(
    family="llama", vocab_size=31, hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8, max_positions=128, rotary_dim=8), 0)


def _num_steps(order: str) -> tuple[int, list[list[int]]]:
    settings = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in (4, 4, 4, 4, 40)]
    steps = []
    engine = Engine(MODEL, EngineConfig(max_batch_size=2, order=order))  # type: ignore[arg-type]
    rollout = engine.generate([[1]] * 5, settings, on_progress=lambda *_: steps.append(1))
    return len(steps), [rollout.response(row) for row in range(5)]


def test_longest_first_shortens_the_tail_and_changes_nothing_else() -> None:
    given, longest_first = _num_steps("given"), _num_steps("longest_first")
    assert longest_first[0] <= 45 < given[0]
    assert longest_first[1] == given[1]


def test_a_page_of_a_cpu_holds_the_longest_sequence_unless_sizes_are_given() -> None:
    def page_size(**sizes: int) -> int:
        engine = Engine(MODEL, EngineConfig(**sizes))
        engine.generate([[1] * 7, [1] * 30], SamplingConfig(max_new_tokens=5))
        assert engine._idle_cache is not None
        return engine._idle_cache.page_size

    assert page_size() == 3 * 16 + 3  # 34 tokens, see fastrl.ops.paged_attention.slots_read
    assert page_size(num_pages=40) == 16
    assert page_size(page_size=8) == 8


def test_the_highest_pages_move_into_gaps_while_nobody_waits() -> None:
    cache = KVCache(SPEC, 5, 32, torch.float32, torch.device("cpu"))
    requests = _requests([(8, 9)] * 6)
    scheduler = Scheduler(requests, cache, EngineConfig())
    scheduler.admit(0)
    scheduler.finish([requests[1], requests[3]])
    assert not scheduler.close_gaps()  # who waits takes the lowest page
    scheduler.admit(1)
    scheduler.finish([requests[0], requests[2]])
    scheduler.number_rows()
    assert scheduler.close_gaps() == [(requests[4], 4)]
    assert [request.pages for request in scheduler.running] == [[0], [1]]
    scheduler.check()
    assert not scheduler.close_gaps()
    # A sequence with pages of another place in it stays where it is.
    cache = KVCache(SPEC, 5, 4, torch.float32, torch.device("cpu"))
    requests = _requests([(8, 9)] * 2)
    scheduler = Scheduler(requests, cache, EngineConfig())
    scheduler.admit(0)
    scheduler.finish(requests[:1])
    assert not scheduler.close_gaps()


def test_sequences_that_stay_are_read_in_one_call_and_keep_their_bits(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = dense_attention._attend_group
    calls: list[tuple[int, bool]] = []  # (sequences, in place) of every dense call of a step

    def watched(query: Tensor, pages: Tensor, layer: int, group: Any, *others: Any) -> Tensor:
        if not group.is_prompt:
            calls.append((len(group.kv_lens), group.in_place is not None))
        return attend(query, pages, layer, group, *others)

    monkeypatch.setattr(dense_attention, "_attend_group", watched)
    lengths = [4, 9, 2, 9, 5, 7, 9, 3]
    settings = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in lengths]
    prompts = [[i, i + 1, i] for i in range(8)]
    rollout = Engine(MODEL, EngineConfig()).generate(prompts, settings)
    assert calls == [(sum(n > step for n in lengths), True) for step in range(1, 9)]
    for row, prompt in enumerate(prompts):
        alone = Engine(MODEL, EngineConfig(page_size=4)).generate(
            [[1]] * row + [prompt], [*[SamplingConfig(max_new_tokens=1)] * row, settings[row]])
        assert rollout.response(row) == alone.response(row)


def test_places_and_prompt_tokens_are_used_up_and_never_exceeded(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, step = generation.compute_prompts, Generation.step
    passes: list[list[int]] = []
    running: list[tuple[int, int]] = []  # (that run after a step, those of them that ran before)

    def watched_pass(model: Any, cache: Any, prompts: Any, *others: Any, **settings: Any) -> Tensor:
        passes.append([len(prompt) for prompt in prompts])
        return compute(model, cache, prompts, *others, **settings)

    def watched_step(self: Generation) -> None:
        before = set(self.scheduler.running)
        step(self)
        running.append((len(self.scheduler.running), len(before & set(self.scheduler.running))))

    monkeypatch.setattr(generation, "compute_prompts", watched_pass)
    monkeypatch.setattr(Generation, "step", watched_step)
    lengths = [6, 3, 3, 20, 1, 8, 2, 2, 9, 9, 1, 5]
    Engine(MODEL, EngineConfig(max_batch_size=5, max_prefill_tokens=12)).generate(
        [[1] * n for n in lengths],
        [SamplingConfig(max_new_tokens=2 + 3 * (i % 4), stop_token_ids=()) for i in range(12)])
    assert [n for one in passes for n in one] == lengths
    assert passes[:2] == [[6, 3, 3], [20]]  # what is longer than the budget goes alone
    assert all(sum(one) <= 12 or len(one) == 1 for one in passes)
    assert max(count for count, _ in running) == 5
    # Places are taken while others are in the middle of their responses.
    assert any(0 < stayed < count == 5 for count, stayed in running)


def test_prompt_tokens_of_a_pass_follow_the_device_where_no_number_is_given() -> None:
    cache = KVCache(SPEC, 4, 4, torch.float32, torch.device("cpu"))
    assert Scheduler([], cache, EngineConfig()).max_prefill_tokens == 2048
    assert Scheduler([], cache, EngineConfig(max_prefill_tokens=7)).max_prefill_tokens == 7
