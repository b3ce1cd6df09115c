"""Held-out sets by prompt, and mixtures by source."""

from collections import Counter

import pytest

from fastrl.data import sample_by_source, split_by_prompt
from fastrl.errors import ConfigError
from fastrl.types import Comparison, Prompt, TokenExample


def prompts(*sources: str) -> list[Prompt]:
    return [Prompt((i,), str(i), source) for i, source in enumerate(sources)]


def test_equal_prompts_fall_on_one_side() -> None:
    items = [Comparison((i % 10,), ((1,), (2,)), (0, 1), source=str(i)) for i in range(40)]
    train, held_out = split_by_prompt(items, 0.3, seed=1)
    sides = [{item.prompt_ids for item in side} for side in (train, held_out)]
    assert [len(side) for side in sides] == [7, 3] and not sides[0] & sides[1]
    assert [item.source for item in train] == sorted((i.source for i in train), key=int)
    assert split_by_prompt(items, 0.3, seed=1) == (train, held_out)
    assert split_by_prompt(items, 0.3, seed=2) != (train, held_out)


def test_examples_split_by_what_precedes_their_targets() -> None:
    items = [TokenExample((1, 2, answer), (False, False, True)) for answer in range(8)]
    items += [TokenExample((3, 4, answer), (False, False, True)) for answer in range(8)]
    train, held_out = split_by_prompt(items, 0.5)
    assert [len(train), len(held_out)] == [8, 8]
    assert len({item.token_ids[0] for item in train}) == 1
    whole = [TokenExample((1, i), (False, True)) for i in range(8)]
    assert [len(side) for side in split_by_prompt(whole, 0.5)] == [4, 4]


def test_neither_side_is_empty_unless_asked_for() -> None:
    items = prompts("a", "a", "a")
    assert [len(side) for side in split_by_prompt(items, 0.01)] == [2, 1]
    assert [len(side) for side in split_by_prompt(items, 0.99)] == [1, 2]
    assert [len(side) for side in split_by_prompt(items, 0.0)] == [3, 0]
    assert [len(side) for side in split_by_prompt(items, 1.0)] == [0, 3]
    with pytest.raises(ConfigError, match="eval_fraction: expected at least 2 different prompts"):
        split_by_prompt(items[:1], 0.5)
    with pytest.raises(ConfigError, match="fraction: expected a number from 0 to 1, got 1.5"):
        split_by_prompt(items, 1.5)


def test_sources_occur_by_weight_and_nothing_repeats_early() -> None:
    items = prompts(*["a"] * 90, *["b"] * 8, *["c"] * 2)
    drawn = sample_by_source(items, {"a": 1, "b": 1}, 21, seed=3)
    assert sorted(Counter(p.source for p in drawn).items()) == [("a", 11), ("b", 10)]
    times = Counter(p.token_ids for p in drawn if p.source == "b")
    assert sorted(times.values()) == [1, 1, 1, 1, 1, 1, 2, 2]
    assert sample_by_source(items, {"a": 1, "b": 1}, 21, seed=3) == drawn
    assert sample_by_source(items, {"a": 1, "b": 1}, 21, seed=4) != drawn
    only_c = sample_by_source(items, {"a": 0, "c": 2}, 3)
    assert [p.source for p in only_c] == ["c", "c", "c"]


def test_unknown_sources_and_bad_weights() -> None:
    items = prompts("a", "b")
    with pytest.raises(ConfigError, match="expected sources among a, b, got 'x'"):
        sample_by_source(items, {"x": 1}, 1)
    with pytest.raises(ConfigError, match="weights.a: expected a number of at least 0"):
        sample_by_source(items, {"a": -1}, 1)
    with pytest.raises(ConfigError, match="weights: expected a weight above 0"):
        sample_by_source(items, {"a": 0}, 1)
