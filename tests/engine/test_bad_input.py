"""Settings and requests that cannot work: an error that names them, before a token is drawn."""

from collections.abc import Callable
from typing import Any

import pytest

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import ConfigError, DataError
from fastrl.models import DecoderConfig, new_decoder

INF, NAN = float("inf"), float("nan")
ENGINE = Engine(new_decoder(DecoderConfig(
    family="llama", vocab_size=17, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2,
    num_kv_heads=1, head_dim=4, max_positions=32, rotary_dim=4, eos_token_ids=(9,)), 0))
SHORT = SamplingConfig(max_new_tokens=3, stop_token_ids=())


@pytest.mark.parametrize(
    ("name", "values"),
    [("temperature", (NAN, INF, 0, -1.0, "1", None, 1e300, 1e-7)),
     ("top_k", (-1, 1.5, NAN, 2**63, "3", True)),
     ("top_p", (0, NAN, 1.1, "1", None)),
     ("min_p", (1, NAN, -0.1, None)),
     ("repetition_penalty", (0, NAN, INF, 1e-300, 1e9, None)),
     ("greedy", ("no", 1, None)),
     ("max_new_tokens", (0, 2.5, NAN, True, None)),
     ("min_new_tokens", (-1, 1.5, 129, None)),
     ("stop_token_ids", ((-1,), (1.5,), ("a",), [1], 1)),
     ("stop_strings", ("END", ("",), ["END"], (1,), None)),
     ("logprobs", ("rw", None, True))],
)
def test_sampling_settings_are_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}: expected .*, got "):
            SamplingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [("page_size", (0, 1.5, NAN, True)),
     ("num_pages", (-1, 2.5)),
     ("max_batch_size", (0, None, 1.5)),
     ("max_prefill_tokens", (0, 1.5)),
     ("order", ("longest", None)),
     ("sync_every", (0, 1.5)),
     ("cuda_graphs", ("yes", True)),
     ("exact", ("no", None)),
     ("share_prefix", ("no", 1))],
)
def test_engine_settings_are_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ConfigError, match=f"^{name}: expected .*, got "):
            EngineConfig(**{name: value})


def test_what_is_refused_and_what_is_not_is_a_neighbour() -> None:
    SamplingConfig(temperature=1e-6, top_k=2**63 - 1, top_p=1e-300, min_p=1 - 1e-9,
                   repetition_penalty=1e6, min_new_tokens=128, stop_token_ids=(),
                   stop_strings=(" ",))
    SamplingConfig(temperature=1, repetition_penalty=1e-6)
    EngineConfig(page_size=1, num_pages=1, max_batch_size=1, max_prefill_tokens=1, sync_every=1)


def test_extreme_settings_give_finite_log_probs() -> None:
    for own in (SamplingConfig(temperature=1e-6), SamplingConfig(temperature=1e6),
                SamplingConfig(top_p=1e-300), SamplingConfig(min_p=1 - 1e-9),
                SamplingConfig(top_k=2**63 - 1), SamplingConfig(repetition_penalty=1e6),
                SamplingConfig(repetition_penalty=1e-6), SamplingConfig(max_new_tokens=2**62)):
        rollout = ENGINE.generate([[3, 4], [5]], own)
        assert rollout.rollout_logprobs.isfinite().all() and rollout.entropy.isfinite().all()
        assert int(rollout.response_ids.max()) < 17


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": seed}, "seed: expected a 64-bit integer") for seed in (2**63, -2**63 - 1, 1.5, None)]
    + [({"first_request_id": number}, "first_request_id: .* at least 0")
       for number in (-1, 2**62, 1.5)]
    + [({"num_samples_per_prompt": number}, "num_samples_per_prompt: .* at least 1")
       for number in (0, -1, 1.5, True)]
    + [({"sampling": sampling}, "sampling: expected one SamplingConfig, or one for each of 1")
       for sampling in ([], [None], [SHORT, SHORT], {"temperature": 1.0}, "greedy")],
    ids=str,
)
def test_numbers_of_a_call(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ENGINE.generate([[3]], **{"sampling": SHORT, **change})


@pytest.mark.parametrize("prompt", [3, "text", [1.5], ["a"], [None], [[3]], None], ids=repr)
def test_prompts_are_token_ids(prompt: Any) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: ENGINE.generate([[3], prompt], SHORT), lambda: ENGINE.stream(prompt, SHORT)]
    for number, call in zip((1, 0), calls, strict=True):
        with pytest.raises(DataError, match=f"prompt {number}: expected a list of token ids"):
            call()


def test_an_engine_takes_a_config() -> None:
    with pytest.raises(ConfigError, match="config: expected an EngineConfig"):
        Engine(ENGINE.model, {"page_size": 4})  # type: ignore[arg-type]


def test_a_refused_call_leaves_the_engine_as_it_was() -> None:
    before = ENGINE.generate([[3], [4, 5]], SHORT, seed=1)
    for prompts in ([[3], [17]], [[3], []], []):
        with pytest.raises((DataError, ConfigError)):
            ENGINE.generate(prompts, SHORT)
    after = ENGINE.generate([[3], [4, 5]], SHORT, seed=1)
    assert before.token_ids.tolist() == after.token_ids.tolist()
