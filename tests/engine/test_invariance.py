"""A request's tokens, bit for bit, whatever else is in the batch; and every page comes back."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.engine.generation import Generation
from fastrl.models import CausalLM, DecoderConfig, new_decoder
from fastrl.types import Rollout

SIZES: dict[str, Any] = {
    "vocab_size": 53, "hidden_size": 20, "intermediate_size": 37, "num_layers": 2, "num_heads": 4,
    "head_dim": 5, "max_positions": 128, "initializer_range": 0.3,
}
# Widths that no vector register divides: 37, 74 and 20.
CONFIGS = {
    "llama": DecoderConfig(family="llama", **SIZES, num_kv_heads=2, rotary_dim=4),
    "gpt2": DecoderConfig(family="gpt2", **SIZES, num_kv_heads=4, norm="layer", gated_mlp=False,
                          activation="gelu_new", qkv_bias=True, mlp_bias=True),
}
MODELS = {name: new_decoder(config, 0) for name, config in CONFIGS.items()}
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [5, 5, 5, 5], [8] * 16, [50, 2, 11, 44, 1],
           [1, 2], [40] * 31]
SAMPLING = SamplingConfig(max_new_tokens=30, stop_token_ids=(0, 1, 2))
pytestmark = pytest.mark.usefixtures("pages_checked_after_every_step")


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _generate(model: CausalLM, seed: int = 0, num_samples: int = 2, **sizes: Any) -> Rollout:
    return Engine(model, EngineConfig(page_size=4, **sizes)).generate(
        PROMPTS, SAMPLING, seed=seed, num_samples_per_prompt=num_samples)


def _assert_same_bits(a: Rollout, b: Rollout) -> None:
    assert a.finish_reasons == b.finish_reasons
    for name in ("token_ids", "response_ids", "response_mask", "rollout_logprobs", "entropy"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"max_batch_size": 1},
        {"max_batch_size": 3},
        {"max_batch_size": 5, "max_prefill_tokens": 1},
        {"max_prefill_tokens": 20},
        {"share_prefix": False},
        {"share_prefix": False, "max_batch_size": 7},
        {"num_pages": 16},
        {"num_pages": 40, "max_batch_size": 6},
        {"num_pages": 21, "share_prefix": False},
    ],
    ids=str,
)
def test_bits_do_not_depend_on_sizes(name: str, sizes: dict[str, Any]) -> None:
    _assert_same_bits(_generate(MODELS[name]), _generate(MODELS[name], **sizes))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CONFIGS)
def test_bits_do_not_depend_on_sizes_with_two_threads(name: str) -> None:
    # Two threads cut rows, products and elementwise functions in other places than one.
    _assert_same_bits(
        _generate(MODELS[name], num_samples=1),
        _generate(MODELS[name], num_samples=1, num_pages=30, max_batch_size=3))


def test_a_request_alone_gives_the_same_bits() -> None:
    together = _generate(MODELS["llama"], num_samples=1)
    engine = Engine(MODELS["llama"], EngineConfig(page_size=4))
    for row, prompt in enumerate(PROMPTS):
        alone = engine.generate([prompt], SAMPLING, first_request_id=row)
        assert alone.response(0) == together.response(row)
        length = alone.max_response_len
        assert torch.equal(alone.rollout_logprobs[0], together.rollout_logprobs[row, :length])


def test_order_of_the_batch_does_not_matter() -> None:
    # With greedy decoding a response depends on its prompt only, so prompts may change places.
    engine = Engine(MODELS["llama"], EngineConfig(page_size=4, max_batch_size=3))
    sampling = SamplingConfig(max_new_tokens=20, greedy=True, stop_token_ids=(0, 1, 2, 3, 4))
    forward = engine.generate(PROMPTS, sampling)
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    shuffled = engine.generate([PROMPTS[i] for i in order], sampling)
    expected = forward.select(order)
    assert torch.equal(shuffled.response_ids, expected.response_ids)
    assert torch.equal(shuffled.rollout_logprobs, expected.rollout_logprobs)


@pytest.mark.parametrize("seed", range(8))
def test_preempted_requests_keep_their_tokens(seed: int, preemptions: list[int]) -> None:
    roomy = _generate(MODELS["llama"], seed)
    assert not preemptions
    tight = _generate(MODELS["llama"], seed, num_pages=16)
    assert len(preemptions) > 3
    _assert_same_bits(roomy, tight)


def test_prompts_are_computed_once_for_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    compute = Generation._compute_prompts

    def counted(self: Generation, prompts: Any, pages: Any) -> None:
        computed.extend(len(prompt.token_ids) for prompt in prompts)
        compute(self, prompts, pages)

    monkeypatch.setattr(Generation, "_compute_prompts", counted)
    # Seven places for 40 samples: most of them start long after their prompt was computed.
    _generate(MODELS["llama"], num_samples=5, max_batch_size=7)
    assert computed == [len(prompt) for prompt in PROMPTS]
    computed.clear()
    _generate(MODELS["llama"], num_samples=5, max_batch_size=7, share_prefix=False)
    assert computed == [len(prompt) for prompt in PROMPTS for _ in range(5)]


def test_the_last_layer_computes_last_tokens_of_prompts_alone() -> None:
    model, seen = MODELS["llama"], [[], []]
    engine = Engine(model, EngineConfig(page_size=4))
    handles = [layer.mlp.register_forward_hook(lambda _, inputs, out, i=i: seen[i].append(
        len(inputs[0]))) for i, layer in enumerate(model.backbone.layers)]
    engine.generate(PROMPTS, SamplingConfig(max_new_tokens=2, stop_token_ids=()))
    for handle in handles:
        handle.remove()
    num_rows = engine._row_count(len(PROMPTS))  # of a decode step as well
    assert seen == [[engine._row_count(sum(map(len, PROMPTS))), num_rows], [num_rows, num_rows]]


def test_samples_share_full_pages_and_own_their_last_one() -> None:
    engine = Engine(MODELS["llama"], EngineConfig(page_size=4, num_pages=400))
    seen: list[tuple[int, int]] = []

    def look(num_tokens: int, num_finished: int, total: int) -> None:
        if not seen:
            running = engine._active[0].scheduler.running
            firsts = {tuple(request.pages[:5]) for request in running}
            lasts = {request.pages[5] for request in running}
            seen.append((len(firsts), len(lasts)))

    engine.generate([PROMPTS[2]], SAMPLING, num_samples_per_prompt=6, on_progress=look)
    assert seen == [(1, 6)]  # 23 tokens: five full pages and three tokens of a sixth


def test_one_sequence_fits_exactly(preemptions: list[int]) -> None:
    # 23 + 30 - 1 tokens in 13 pages of 4, and six samples of that prompt.
    engine = Engine(MODELS["llama"], EngineConfig(page_size=4, num_pages=13))
    sampling = SamplingConfig(max_new_tokens=30, stop_token_ids=())
    rollout = engine.generate([PROMPTS[2]], sampling, num_samples_per_prompt=6)
    assert rollout.response_mask.all()
    roomy = Engine(MODELS["llama"], EngineConfig(page_size=4)).generate(
        [PROMPTS[2]], sampling, num_samples_per_prompt=6)
    _assert_same_bits(rollout, roomy)


def test_weights_changed_in_the_middle_recomputes_every_page() -> None:
    model = new_decoder(CONFIGS["llama"], 0)
    engine = Engine(model, EngineConfig(page_size=4, max_batch_size=6))
    first = engine.generate(PROMPTS, SAMPLING)
    calls = []

    def change(num_tokens: int, num_finished: int, total: int) -> None:
        calls.append(num_tokens)
        if len(calls) == 9:
            engine.weights_changed()  # the same weights: nothing may change

    again = engine.generate(PROMPTS, SAMPLING, on_progress=change)
    _assert_same_bits(first, again)
    assert calls == sorted(calls)


def test_a_failed_call_gives_its_pages_back() -> None:
    engine = Engine(MODELS["llama"], EngineConfig(page_size=4))

    def fail(num_tokens: int, num_finished: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, SAMPLING, on_progress=fail)
    assert not engine._active and engine._idle_cache is not None
    assert engine._idle_cache.num_free == engine._idle_cache.num_pages


LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=6)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(lengths=LENGTHS, num_samples=st.integers(1, 3), page_size=st.sampled_from([1, 3, 4, 16]),
       max_batch_size=st.integers(1, 9), max_prefill_tokens=st.integers(1, 40),
       extra_pages=st.integers(0, 30), share_prefix=st.booleans(), seed=st.integers(0, 99))
def test_any_schedule_gives_the_same_tokens(
    lengths: list[int], num_samples: int, page_size: int, max_batch_size: int,
    max_prefill_tokens: int, extra_pages: int, share_prefix: bool, seed: int,
) -> None:
    prompts = [[(7 * i + n) % 53 for i in range(n)] for n in lengths]
    sampling = SamplingConfig(max_new_tokens=12, stop_token_ids=tuple(range(5)))
    smallest = -(-(max(lengths) + 11) // page_size)
    tight = EngineConfig(page_size=page_size, num_pages=smallest + extra_pages,
                         max_batch_size=max_batch_size, max_prefill_tokens=max_prefill_tokens,
                         share_prefix=share_prefix)
    rollouts = [Engine(MODELS["llama"], config).generate(
        prompts, sampling, seed=seed, num_samples_per_prompt=num_samples)
        for config in (EngineConfig(page_size=page_size), tight)]
    _assert_same_bits(*rollouts)
