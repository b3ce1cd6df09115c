"""Samples of a prompt whose pages are read once: which rows, and that no token depends on it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation, prefixes
from fastrl.engine import engine as engine_file
from fastrl.engine.graphs import StepGraphs, fixed_parts
from fastrl.engine.prefixes import prefix_groups
from fastrl.engine.request import Request, SharedPrompt
from fastrl.models import DecoderConfig, PagedAttention, new_decoder
from fastrl.types import Rollout

CONFIG = DecoderConfig(
    family="llama", vocab_size=53, hidden_size=20, intermediate_size=37, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=5, rotary_dim=4, max_positions=128, initializer_range=0.3)
MODEL = new_decoder(CONFIG, 0)
PROMPTS = [[3, 9, 4], list(range(20, 43)), [5, 5, 5, 5], [8] * 16]
SAMPLING = SamplingConfig(max_new_tokens=12, stop_token_ids=(0, 1, 2, 3, 4))
Groups = list[tuple[int, int, int]]
pytestmark = pytest.mark.usefixtures("pages_checked_after_every_step")


def _running(*samples: tuple[int, int], first_page: int = 1) -> list[Request]:
    """Requests of prompts with (tokens, samples), each prompt with a first page of its own."""
    requests: list[Request] = []
    for page, (length, count) in enumerate(samples, first_page):
        prompt = SharedPrompt(tuple([7] * length), 0)
        requests += [Request(len(requests) + i, prompt, 0, 8, SAMPLING, pages=[page])
                     for i in range(count)]
    return requests


def test_groups_are_samples_beside_each_other_with_the_same_pages() -> None:
    running = _running((100, 3), (63, 2), (64, 2), (200, 1), (130, 2))
    groups = prefix_groups(running, 16, 2**20)
    assert groups == [(0, 3, 96), (5, 2, 64), (8, 2, 128)]
    running[2].pages = [77]  # its prompt was computed again
    assert prefix_groups(running, 16, 2**20)[0] == (0, 2, 96)
    assert prefix_groups([], 16, 2**20) == []


@pytest.mark.parametrize(("count", "expected"), [
    (16, [(1, 16)]), (17, [(1, 16)]), (18, [(1, 16), (17, 2)]), (40, [(1, 16), (17, 16), (33, 8)])])
def test_large_groups_are_cut(count: int, expected: list[tuple[int, int]]) -> None:
    groups = prefix_groups(_running((64, 1), (64, count)), 16, 2**20)
    assert groups == [(first, rows, 64) for first, rows in expected]


def test_it_has_to_pay() -> None:
    # Llama-3.1-8B in bfloat16 has 4096 bytes per token and layer: 1024 tokens make 4 MiB.
    running = _running((128, 8))  # 7 * 128 tokens are saved
    assert prefix_groups(running, 16, 4096) == []
    running = _running((128, 5), (128, 5))
    assert prefix_groups(running, 16, 4096) == [(0, 5, 128), (5, 5, 128)]


@pytest.fixture
def any_group_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "MIN_TOKENS", 1)
    monkeypatch.setattr(prefixes, "MIN_SAVED_BYTES", 0)


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in ("token_ids", "response_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class Watch:
    """Every decode step's groups, found again from its page table; and each layer held to them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.groups: list[Groups] = []

    def __call__(self, state: PagedAttention, layer: int, *others: Any) -> Tensor:
        """In place of PagedAttention._attend: shared pages are those of the first row alone."""
        if state.prefixes is None or state.max_seqlen_q > 1:
            return ATTEND(state, layer, *others)
        table, lens = state.page_table.clone(), state.prefixes.shared_lens
        page_size, seen = state.kv_pages.shape[3], torch.zeros_like(lens)
        found: Groups = []
        for first, count in state.prefixes.groups.tolist():
            if not count:
                continue
            tokens, rows = int(lens[first]), slice(first, first + count)
            assert count > 1 and tokens > 0 and tokens % page_size == 0
            shared = table[rows, : tokens // page_size]
            assert torch.equal(shared, shared[:1].expand_as(shared))
            kv_lens = state.kv_lens[rows]
            assert ((kv_lens == 0) | (kv_lens > tokens)).all()
            seen[rows] += tokens
            found.append((first, count, tokens))
        assert found and torch.equal(seen, lens)
        self.groups.append(found)
        self.sizes += [count for _, count, _ in found]
        return ATTEND(state, layer, *others)


ATTEND: Any = PagedAttention._attend


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, any_group_pays: None) -> Watch:
    watch = Watch()
    monkeypatch.setattr(PagedAttention, "_attend", lambda *arguments: watch(*arguments))
    return watch


class NoGroups:
    """Replaces the rule for the time of a block."""

    def __enter__(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(generation, "prefix_groups", lambda *arguments, **settings: [])

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


def test_groups_follow_the_batch_as_samples_finish_and_start(watch: Watch) -> None:
    config = EngineConfig(page_size=4, max_batch_size=7, sync_every=3)
    rollout = Engine(MODEL, config).generate(PROMPTS, SAMPLING, num_samples_per_prompt=5)
    # Five samples of [3, 9, 4] have no full page; those of the others come and go.
    assert set(watch.sizes) == {2, 3, 4}
    assert {tokens for groups in watch.groups for _, _, tokens in groups} == {20, 4, 16}
    assert len({tuple(groups) for groups in watch.groups}) > 6
    with NoGroups():
        before = len(watch.groups)
        _assert_same_bits(rollout, Engine(MODEL, config).generate(
            PROMPTS, SAMPLING, num_samples_per_prompt=5))
        assert len(watch.groups) == before


def test_as_many_groups_as_there_are_pairs_of_rows(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "_batch_rows", lambda self, num_rows: num_rows)  # no dummies
    Engine(MODEL, EngineConfig(page_size=4)).generate(
        PROMPTS[1:], SamplingConfig(max_new_tokens=3, stop_token_ids=()), num_samples_per_prompt=2)
    assert {tuple(groups) for groups in watch.groups} == {((0, 2, 20), (2, 2, 4), (4, 2, 16))}


def test_nothing_is_shared_where_no_pages_are(watch: Watch) -> None:
    Engine(MODEL, EngineConfig(page_size=4, share_prefix=False)).generate(
        PROMPTS, SAMPLING, num_samples_per_prompt=3)
    Engine(MODEL, EngineConfig(page_size=4)).generate(PROMPTS, SAMPLING)
    Engine(MODEL, EngineConfig(page_size=32)).generate(PROMPTS, SAMPLING, num_samples_per_prompt=3)
    assert not watch.groups


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StepGraphs]]:
    """Fixed addresses, flags read a round late, and a capture that runs the step."""
    made: list[StepGraphs] = []

    def graphs_for(model: Any, config: Any, pages: Any, previous: StepGraphs | None) -> StepGraphs:
        parts = fixed_parts(model, pages, config.max_batch_size)
        if previous is None or previous.parts != parts:
            made.append(StepGraphs(parts, 96, capture=lambda warm_up, run: warm_up() or run))
        return made[-1]

    monkeypatch.setattr(engine_file, "graphs_for", graphs_for)
    monkeypatch.setitem(generation.ROUNDS_BEHIND, "cpu", 1)
    yield made


def test_a_graph_with_groups_is_another(watch: Watch, like_a_gpu: list[StepGraphs]) -> None:
    engine = Engine(MODEL, EngineConfig(page_size=4, max_batch_size=9, sync_every=4))
    rollout = engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=4)
    count = len(watch.groups)
    with NoGroups():
        again = engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=4)
    _assert_same_bits(rollout, again)
    _assert_same_bits(rollout, engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=4))
    # Warming up, too, walks the layers, but captures nothing anew in the last call.
    assert len(watch.groups) > 1.5 * count and len(like_a_gpu) == 1
    keys = set(like_a_gpu[0].capture_s)
    grouped = {replace(key, has_groups=False) for key in keys if key.has_groups}
    assert grouped and grouped <= keys


def test_preempted_samples_share_what_was_computed_again(
    watch: Watch, preemptions: list[int]
) -> None:
    roomy = Engine(MODEL, EngineConfig(page_size=4)).generate(
        PROMPTS, SAMPLING, num_samples_per_prompt=3)
    assert not preemptions
    for sync_every in (1, 3):
        _assert_same_bits(roomy, Engine(MODEL, EngineConfig(
            page_size=4, num_pages=14, sync_every=sync_every)).generate(
                PROMPTS, SAMPLING, num_samples_per_prompt=3))
    assert len(preemptions) > 3 and len(watch.groups) > 10


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), num_samples=st.integers(2, 5),
    page_size=st.sampled_from([1, 3, 4]), max_batch_size=st.integers(2, 9),
    extra_pages=st.integers(0, 30), max_prefill_tokens=st.integers(1, 40),
    sync_every=st.sampled_from([1, 3, 8]), seed=st.integers(0, 99),
    largest=st.sampled_from([2, 16]),
)
def test_any_schedule_gives_the_same_bits_with_groups_and_without(
    lengths: list[int], num_samples: int, page_size: int, max_batch_size: int, extra_pages: int,
    max_prefill_tokens: int, sync_every: int, seed: int, largest: int,
) -> None:
    prompts = [[(7 * i + n) % 53 for i in range(n)] for n in lengths]
    config = EngineConfig(
        page_size=page_size, num_pages=-(-(max(lengths) + 11) // page_size) + extra_pages,
        max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens,
        sync_every=sync_every)
    watch = Watch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "MIN_TOKENS", 1)
        patch.setattr(prefixes, "MIN_SAVED_BYTES", 0)
        patch.setattr(prefixes, "MAX_ROWS", largest)
        patch.setitem(generation.ROUNDS_BEHIND, "cpu", seed % 2)
        patch.setattr(PagedAttention, "_attend", lambda *arguments: watch(*arguments))
        grouped = Engine(MODEL, config).generate(
            prompts, SAMPLING, seed=seed, num_samples_per_prompt=num_samples)
        with NoGroups():
            plain = Engine(MODEL, config).generate(
                prompts, SAMPLING, seed=seed, num_samples_per_prompt=num_samples)
    _assert_same_bits(plain, grouped)
    assert max(watch.sizes, default=2) <= largest
