"""`python -m benchmarks big` at small sizes: the flow, and what each phase holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import big
from benchmarks.engine_workloads import SMALL
from benchmarks.results import load


def num_weights(*, has_lm_head: bool) -> int:
    """Of SMALL by hand: V 97, D 32, F 48, 4 query and 2 KV heads of 8 channels, 2 layers."""
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    return 97 * 32 + 2 * layer + 32 + (97 * 32 if has_lm_head else 32)


def test_a_small_iteration_has_a_row_for_each_phase(tmp_path: Path) -> None:
    assert big.run_big("cpu", True, tmp_path / "big.json")
    document, rows = load(tmp_path / "big.json")
    assert document["topic"] == "big"
    assert [row.case for row in rows] == ["iteration", *big.PHASES]
    assert all(row.status == "ok" and row.median_s > 0 for row in rows)
    assert rows[0].median_s >= sum(row.median_s for row in rows[1:]) * 0.5
    policy, critic = num_weights(has_lm_head=True), num_weights(has_lm_head=False)
    assert rows[0].extra["parameters"] == policy
    held = {row.case: row.extra["resident_bytes"] for row in rows[1:]}
    # bf16 weights; a remainder of 2 bytes, moments of 2, a scale of 8 for 256 of them and for what
    # is left of a tensor. A model besides has frequencies and a bias.
    assert policy * 2 <= held["rollout"] < policy * 2 + 100
    assert policy * 2 <= held["scoring"] < policy * 2 + 100
    assert policy * 6 <= held["policy_update"] < policy * 6.3
    assert critic * 6 <= held["critic_update"] < critic * 6.3


def test_what_is_raised_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = replace(big.load_of(True), prompt=SMALL.max_positions)
    monkeypatch.setattr(big, "load_of", lambda small: too_long)
    (row,) = big.run_big("cpu", True, tmp_path / "big.json")
    assert row.status == "error" and row.is_failure and "64 positions" in row.reason


def test_the_large_shape_is_that_of_8_billion_parameters() -> None:
    config = big.load_of(False).config
    assert (config.hidden_size, config.num_layers, config.vocab_size) == (4096, 32, 128256)
    assert not config.tie_embeddings
