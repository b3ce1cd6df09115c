"""Requests with settings of their own side by side: each is what it would be alone, bit for bit."""

from typing import Any

import pytest
import torch

from fastrl.config import EngineConfig, SamplingConfig
from fastrl.engine import Engine
from fastrl.errors import ConfigError
from fastrl.models import DecoderConfig, new_decoder

MODEL = new_decoder(DecoderConfig(
    family="llama", vocab_size=53, hidden_size=20, intermediate_size=37, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=5, max_positions=128, rotary_dim=4, initializer_range=0.3,
    eos_token_ids=(9,)), 0)
PROMPTS = [[3, 9, 4], [7], list(range(20, 43)), [5, 5, 5, 5], [8] * 16, [50, 2, 11, 44, 1], [1, 2],
           [40] * 31, [6, 7]]


class LetterDecoder:
    """Token id -> one of seven letters."""

    def decode(self, ids: list[int]) -> str:
        return "".join("abcdefg"[i % 7] for i in ids)


MIXED = [
    SamplingConfig(max_new_tokens=20, greedy=True),
    SamplingConfig(max_new_tokens=25),
    SamplingConfig(max_new_tokens=5, top_k=3, temperature=0.7, logprobs="raw"),
    SamplingConfig(max_new_tokens=30, top_p=0.6, stop_token_ids=(0, 1, 2, 3)),
    SamplingConfig(max_new_tokens=12, repetition_penalty=3.0, stop_token_ids=()),
    SamplingConfig(max_new_tokens=1, min_p=0.2),
    SamplingConfig(max_new_tokens=18, stop_token_ids=tuple(range(40)), min_new_tokens=7,
                   logprobs="raw", temperature=1.5),
    SamplingConfig(max_new_tokens=22, stop_strings=("ba", "g"), stop_token_ids=()),
    SamplingConfig(max_new_tokens=9, greedy=True, repetition_penalty=1e6, top_k=5),
]


@pytest.mark.parametrize(
    "sizes",
    [{}, {"max_batch_size": 4}, {"num_pages": 18, "page_size": 4},
     {"max_batch_size": 3, "order": "longest_first"}],
    ids=str,
)
def test_each_request_is_what_it_is_alone(sizes: dict[str, Any]) -> None:
    engine = Engine(MODEL, EngineConfig(**sizes), encoder=LetterDecoder())
    alone = Engine(MODEL, EngineConfig(), encoder=LetterDecoder())
    together = engine.generate(PROMPTS, MIXED, seed=4, num_samples_per_prompt=2)
    for row in range(18):
        own = alone.generate([PROMPTS[row // 2]], MIXED[row // 2], seed=4, first_request_id=row)
        assert together.response(row) == own.response(0), row
        assert together.finish_reasons[row] == own.finish_reasons[0]
        length = own.max_response_len
        for name in ("rollout_logprobs", "entropy"):
            assert torch.equal(getattr(together, name)[row, :length], getattr(own, name)[0]), name
            assert not getattr(together, name)[row, length:].any()


def test_every_setting_has_its_effect() -> None:
    rollout = Engine(MODEL, encoder=LetterDecoder()).generate(PROMPTS, MIXED, seed=4)
    lengths = rollout.response_lens.tolist()
    assert all(length <= own.max_new_tokens for length, own in zip(lengths, MIXED, strict=True))
    assert lengths[2] == 5 and lengths[4] == 12 and lengths[5] == 1 and lengths[8] == 9
    assert len(set(rollout.response(8))) == 9  # the penalty leaves no token twice
    assert lengths[6] > 7 and all(token >= 40 for token in rollout.response(6)[:7])
    ends = {row: rollout.response(row)[-1] for row in (0, 1, 3)}
    for row, stops in ((0, {9}), (1, {9}), (3, {0, 1, 2, 3})):
        assert (ends[row] in stops) == (rollout.finish_reasons[row] == "stop")
        assert not stops & set(rollout.response(row)[:-1])
    text = LetterDecoder().decode(rollout.response(7))
    assert rollout.finish_reasons[7] == "stop" and (text.endswith("ba") or text.endswith("g"))


def test_equal_settings_may_be_given_once_or_for_each() -> None:
    own = SamplingConfig(max_new_tokens=10, top_k=7)
    engine = Engine(MODEL)
    once, each = engine.generate(PROMPTS, own), engine.generate(PROMPTS, [own] * len(PROMPTS))
    assert torch.equal(once.token_ids, each.token_ids)
    assert torch.equal(once.rollout_logprobs, each.rollout_logprobs)


def test_as_many_settings_as_prompts() -> None:
    with pytest.raises(ConfigError, match="one for each of 9 prompts, got 2"):
        Engine(MODEL).generate(PROMPTS, MIXED[:2])
    with pytest.raises(ConfigError, match="encoder"):
        Engine(MODEL).generate(PROMPTS, MIXED)  # one of them has stop strings
