"""Rounds of several decode steps: the same bits as one by one, and no host inside a step."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine, generation
from fastrl.engine.flags import Flags
from fastrl.engine.generation import Generation
from fastrl.engine.scheduler import Scheduler
from fastrl.engine.step import DeviceStep
from fastrl.models import DecoderConfig, new_decoder
from fastrl.types import Rollout

CONFIG = DecoderConfig(
    family="llama", vocab_size=53, hidden_size=20, intermediate_size=37, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=5, rotary_dim=4, max_positions=128, initializer_range=0.3)
MODEL = new_decoder(CONFIG, 0)
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [5, 5, 5, 5], [8] * 16, [50, 2, 11, 44, 1]]
SAMPLING = SamplingConfig(max_new_tokens=30, stop_token_ids=(0, 1, 2))
pytestmark = pytest.mark.usefixtures("pages_checked_after_every_step")


@contextmanager
def _rounds_behind(number: int) -> Iterator[None]:
    """A CPU that reads flags as late as a GPU does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generation.ROUNDS_BEHIND, "cpu", number)
        yield


def _generate(behind: int = 0, num_samples: int = 2, **sizes: Any) -> Rollout:
    with _rounds_behind(behind):
        return Engine(MODEL, EngineConfig(page_size=4, **sizes)).generate(
            PROMPTS, SAMPLING, num_samples_per_prompt=num_samples)


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in ("token_ids", "response_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("sync_every", [2, 3, 8, 64])
def test_bits_do_not_depend_on_rounds(
    sync_every: int, behind: int, preemptions: list[int]
) -> None:
    plain = _generate()
    _assert_same_bits(plain, _generate(behind, sync_every=sync_every, max_batch_size=5))
    assert not preemptions
    _assert_same_bits(plain, _generate(behind, sync_every=sync_every, num_pages=16))
    assert len(preemptions) > 3


KINDS = (
    SamplingConfig(max_new_tokens=12, stop_token_ids=tuple(range(5))),
    SamplingConfig(max_new_tokens=1),
    SamplingConfig(max_new_tokens=9, greedy=True, stop_token_ids=(3, 4, 5), min_new_tokens=3),
    SamplingConfig(max_new_tokens=12, temperature=0.7, top_k=9, repetition_penalty=1.3,
                   stop_token_ids=tuple(range(10, 20)), logprobs="raw"),
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.sampled_from(KINDS)), min_size=1, max_size=6),
    num_samples=st.integers(1, 3), page_size=st.sampled_from([1, 3, 4, 16]),
    max_batch_size=st.integers(1, 9), extra_pages=st.integers(0, 30),
    sync_every=st.sampled_from([1, 2, 3, 8]), behind=st.integers(0, 1), seed=st.integers(0, 99),
)
def test_any_schedule_in_rounds_gives_the_same_bits(
    lengths: list[tuple[int, SamplingConfig]], num_samples: int, page_size: int,
    max_batch_size: int, extra_pages: int, sync_every: int, behind: int, seed: int,
) -> None:
    prompts = [[(7 * i + n) % 53 for i in range(n)] for n, _ in lengths]
    kinds = [kind for _, kind in lengths]
    smallest = -(-(max(n for n, _ in lengths) + 11) // page_size)
    tight = EngineConfig(page_size=page_size, num_pages=smallest + extra_pages,
                         max_batch_size=max_batch_size, sync_every=sync_every)
    plain = Engine(MODEL, EngineConfig(page_size=page_size)).generate(
        prompts, kinds, seed=seed, num_samples_per_prompt=num_samples)
    late = (sync_every - 1) + sync_every * behind
    starts: dict[int, int] = {}
    admit = Scheduler.admit

    def noted(self: Scheduler, step: int) -> Any:
        admission = admit(self, step)
        for request in admission.started:
            starts.setdefault(request.place, step)
        return admission

    with _rounds_behind(behind), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "admit", noted)
        _assert_same_bits(plain, Engine(MODEL, tight).generate(
            prompts, kinds, seed=seed, num_samples_per_prompt=num_samples))
    bound = 0
    for place in range(len(starts)):
        assert starts[place] <= bound
        bound += kinds[place // num_samples].max_new_tokens - 1 + late


@pytest.mark.parametrize("behind", [0, 1])
def test_cancelling_between_rounds_keeps_what_was_drawn(behind: int) -> None:
    whole = _generate()
    counts: list[int] = []
    with _rounds_behind(behind):
        engine = Engine(MODEL, EngineConfig(page_size=4, sync_every=3, max_batch_size=7))

        def cancel(num_tokens: int, num_finished: int, total: int) -> None:
            counts.append(num_tokens)
            if len(counts) == 5:
                engine.cancel([2, 4, 11])

        cut = engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=2, on_progress=cancel)
    assert counts == sorted(counts) and counts[-1] == int(cut.response_mask.sum())
    assert cut.finish_reasons.count("cancelled") >= 2
    for row in range(12):
        response = cut.response(row)
        assert response == whole.response(row)[: len(response)]
        if cut.finish_reasons[row] != "cancelled":
            assert len(response) == len(whole.response(row))


@pytest.mark.parametrize("behind", [0, 1])
def test_new_weights_between_rounds_change_nothing_when_they_are_the_same(behind: int) -> None:
    whole = _generate()
    calls: list[int] = []
    with _rounds_behind(behind):
        engine = Engine(MODEL, EngineConfig(page_size=4, sync_every=3, max_batch_size=7))

        def change(num_tokens: int, num_finished: int, total: int) -> None:
            calls.append(num_tokens)
            if len(calls) in (4, 7):
                engine.weights_changed()

        again = engine.generate(PROMPTS, SAMPLING, num_samples_per_prompt=2, on_progress=change)
    assert calls == sorted(calls) and calls[-1] == int(whole.response_mask.sum())
    _assert_same_bits(whole, again)


@pytest.mark.parametrize("behind", [0, 1])
def test_tokens_drawn_before_new_weights_stay(behind: int) -> None:
    """And those after it are what the new weights would add to them."""
    old, new = new_decoder(CONFIG, 0), new_decoder(CONFIG, 1)
    free = SamplingConfig(max_new_tokens=20, greedy=True, stop_token_ids=())
    whole = Engine(old).generate(PROMPTS, free)
    # Whatever the old weights never draw: the new ones would stop in the middle of a replay.
    stops = tuple(sorted(set(range(53)) - set(whole.response_ids.flatten().tolist())))
    sampling = replace(free, stop_token_ids=stops)
    known: list[int] = []
    with _rounds_behind(behind):
        engine = Engine(old, EngineConfig(page_size=4, sync_every=3))

        def change(num_tokens: int, num_finished: int, total: int) -> None:
            if not known and num_tokens > 40:
                old.load_state_dict(new.state_dict())
                engine.weights_changed()
                known.extend(request.num_tokens for request in engine._active[0].requests)

        mixed = engine.generate(PROMPTS, sampling, on_progress=change)
    assert sum(known) > 40 and max(known) < 20
    for row, count in enumerate(known):
        begun, response = whole.response(row)[:count], mixed.response(row)
        assert response[:count] == begun
        assert torch.equal(mixed.rollout_logprobs[row, :count], whole.rollout_logprobs[row, :count])
        rest = Engine(new).generate([PROMPTS[row] + begun],
                                    replace(sampling, max_new_tokens=20 - count))
        assert response[count:] == rest.response(0)


class Letters:
    """Token id -> a letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(97 + i % 26) for i in ids)


def test_stop_strings_and_streams_look_at_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(generation.ROUNDS_BEHIND, "cpu", 1)
    engine = Engine(MODEL, EngineConfig(page_size=4, sync_every=8), encoder=Letters())
    rounds: list[int] = []
    decode = DeviceStep.decode

    def counted(self: DeviceStep, *arguments: Any, **keywords: Any) -> None:
        rounds[-1] += 1
        decode(self, *arguments, **keywords)

    step = Generation.step

    def begun(self: Generation) -> None:
        rounds.append(0)
        step(self)

    monkeypatch.setattr(DeviceStep, "decode", counted)
    monkeypatch.setattr(Generation, "step", begun)
    rollout = engine.generate([[3]], SamplingConfig(max_new_tokens=20, stop_token_ids=(),
                                                    stop_strings=("zzzz",)))
    assert max(rounds) == 1 and rollout.response_lens.tolist() == [20]
    rounds.clear()
    for encoder in (Letters(), None):
        engine.encoder = encoder
        tokens = [token.token_id for token in engine.stream(
            [3], SamplingConfig(max_new_tokens=20, stop_token_ids=()))]
        assert tokens == rollout.response(0) and max(rounds) == 1


@pytest.mark.parametrize(("sync_every", "rounds"), [(1, 29), (4, 8), (8, 4), (64, 1)])
def test_the_host_looks_once_a_round(
    sync_every: int, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    read = Flags.read
    monkeypatch.setattr(Flags, "read", lambda self: looks.append(1) or read(self))
    engine = Engine(MODEL, EngineConfig(sync_every=sync_every))
    engine.generate(PROMPTS, SamplingConfig(max_new_tokens=30, stop_token_ids=()))
    assert len(looks) == rounds + 1  # the first tokens come from the prompts


def test_dead_rows_write_nothing() -> None:
    free = SamplingConfig(max_new_tokens=16, greedy=True, stop_token_ids=())
    response = Engine(MODEL).generate([PROMPTS[0]], free).response(0)
    stop = next(i for i in range(2, 16) if response[i] not in response[:i])
    engine = Engine(MODEL, EngineConfig(page_size=4, sync_every=16))
    rollout = engine.generate([PROMPTS[0]], SamplingConfig(
        max_new_tokens=16, greedy=True, stop_token_ids=(response[stop],)))
    assert rollout.response(0) == response[: stop + 1] and stop < 15
    assert engine._idle_cache is not None
    # The prompt and all but the last token, in pages that are handed out from the first on.
    written = engine._idle_cache.kv_pages.transpose(1, 3).flatten(0, 1).ne(0).flatten(1).any(1)
    assert written.sum() == len(PROMPTS[0]) + stop and written[: len(PROMPTS[0]) + stop].all()


def test_a_dead_row_may_have_filled_its_last_page() -> None:
    # 25 tokens fill the page table while the other prompt goes on in the same round.
    sampling = [SamplingConfig(max_new_tokens=n, stop_token_ids=()) for n in (3, 20)]
    rollout, plain = (
        Engine(MODEL, EngineConfig(page_size=1, sync_every=n)).generate(PROMPTS[2:0:-1], sampling)
        for n in (16, 1))
    assert rollout.response_lens.tolist() == [3, 20]
    _assert_same_bits(rollout, plain)


class HostReads(TorchDispatchMode):
    """Notes which file of fastrl makes the host wait for a number, or a shape depend on one."""

    NAMES = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select",
             "unique", "_unique2", "repeat_interleave", "bincount")

    def __init__(self) -> None:
        super().__init__()
        self.files: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] \
            if name in ("index", "index_put", "index_put_") else []
        if name in self.NAMES or masks:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        frame = sys._getframe(1)
        while frame is not None and "/fastrl/" not in frame.f_code.co_filename:
            frame = frame.f_back
        assert frame is not None
        self.files.add(frame.f_code.co_filename.rpartition("/fastrl/")[2])


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_no_number_is_read_inside_a_step(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the plain-torch forms of three ops, which a GPU has kernels for."""
    mode, steps = HostReads(), []
    decode, tolist = DeviceStep.decode, torch.Tensor.tolist

    def watched(self: DeviceStep, *arguments: Any, **keywords: Any) -> None:
        with mode, pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda self: mode.note() or tolist(self))
            decode(self, *arguments, **keywords)
        steps.append(1)

    monkeypatch.setattr(DeviceStep, "decode", watched)
    Engine(MODEL, EngineConfig(page_size=4, num_pages=17, sync_every=4)).generate(
        PROMPTS, [KINDS[kind], KINDS[0]] * 3)
    assert steps
    assert mode.files <= {"ops/kv_cache.py", "dense_attention.py", "paged_plan.py",
                          "ops/sampling.py"}  # what a CPU looks up
    assert "paged_plan.py" in mode.files  # the watch works
