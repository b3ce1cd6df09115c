"""`python -m benchmarks exact` at small sizes: what its rows say, and that it says what fails."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.exact as bench
from benchmarks.exact import run_exact
from benchmarks.results import Row, load
from fastrl.engine.cache import KVCache


def by_case(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.workload, row.case): row for row in rows}


def row_of(workload: str) -> Row:
    return Row(workload=workload, sizes={}, dtype="float32", provider="fastrl", status="skipped",
               reason="not yet measured")


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    path = tmp_path / "exact.json"
    rows = by_case(run_exact("cpu", True, path, time.monotonic() + 100))
    assert by_case(load(path)[1]).keys() == rows.keys()
    assert rows["sweep", ""].extra == {"num_lines": 11, "failed": []}
    for case in ("exact", "fast"):
        made = rows["generate", case].extra
        assert made["num_tokens"] == 6 * 12
        assert made["logprob_gap_mean"] <= made["logprob_gap_max"] <= 1e-5
        assert rows["generate", case].rounds == rows["update", case].rounds == bench.ROUNDS
    for workload in ("generate", "update"):
        exact, fast = rows[workload, "exact"], rows[workload, "fast"]
        assert exact.median_s is not None and fast.median_s is not None
        assert exact.extra["cost"] == pytest.approx(exact.median_s / fast.median_s, abs=1e-4)
        assert "cost" not in fast.extra
    held, free = (rows["update beside the cache", f"cache {what}"] for what in
                  ("held", "given back"))
    # A page per response: 16 tokens and 3 that attention reads beside them; two layers with two
    # KV heads of 8 in float32.
    num_bytes = 6 * 19 * 2 * 2 * 2 * 8 * 4
    assert held.extra["cache_bytes"] == held.extra["held_bytes"] == num_bytes
    assert free.extra["cache_bytes"] == num_bytes and free.extra["held_bytes"] == 0
    assert held.peak_bytes is not None and free.peak_bytes is not None
    assert held.extra["largest_microbatch_tokens"] == 64
    for case in ("map", "unmap"):
        switch = rows["arena", case]
        assert switch.rounds == bench.ROUNDS
        assert switch.extra == {"num_bytes": num_bytes, "keeps_addresses": True}
    for case in ("leaves", "comes back"):
        moved = rows["parking", case]
        assert moved.rounds == bench.ROUNDS and moved.extra["keeps_addresses"] is True
        # Two layers: q, k, v; out; gate and up; down; two norms. Both ends, a norm, angles.
        layer = 64 * 32 + 32 * 32 + 96 * 32 + 32 * 48 + 2 * 32
        assert moved.extra["num_bytes"] == 4 * (2 * layer + 2 * 97 * 32 + 32 + 4)


def test_the_engines_own_cache_is_switched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every `arena` row is one switch of the cache that the exact engine generated with."""
    switches: list[tuple[str, int]] = []

    def note(name: str, real: Any) -> None:
        def noted(cache: KVCache) -> None:
            switches.append((name, id(cache)))
            real(cache)

        monkeypatch.setattr(KVCache, name, noted)

    note("map", KVCache.map)
    note("unmap", KVCache.unmap)
    made = bench.ExactBench("cpu", True, tmp_path / "exact.json", time.monotonic() + 100)
    made.generate(row_of("generate"))
    cache = made._engines["exact"].idle_cache
    switches.clear()
    made.arena(row_of("arena"))
    own = [name for name, number in switches if number == id(cache)]
    assert own == ["unmap", "map"] * (1 + bench.ROUNDS)
    assert {name for name, number in switches if number != id(cache)} == {"unmap"}  # the fast one's


def test_without_a_cache_the_row_says_so(tmp_path: Path) -> None:
    made = bench.ExactBench("cpu", True, tmp_path / "exact.json", time.monotonic() + 100)
    with pytest.raises(LookupError, match="generate has left no cache"):
        made.arena(row_of("arena"))


def test_a_failure_and_the_end_of_the_time_are_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: object) -> None:
        raise RuntimeError("no such product")

    monkeypatch.setattr(bench, "sweep", broken)
    monkeypatch.setattr(bench.ExactBench, "generate", lambda self, row: setattr(
        self, "deadline", 0.0))
    first, *rest = run_exact("cpu", True, tmp_path / "exact.json", time.monotonic() + 100)
    assert first.is_failure and first.reason == "RuntimeError: no such product"
    assert {row.reason for row in rest} == {"the time is used up"} and len(rest) == 4


def test_a_wrong_engine_shows_in_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = bench.update_logprobs

    def other(*args: object) -> torch.Tensor:
        return real(*args) - 0.25  # type: ignore[arg-type]

    monkeypatch.setattr(bench, "update_logprobs", other)
    monkeypatch.setattr(bench.ExactBench, "update", lambda self, row: setattr(
        self, "deadline", 0.0))
    rows = by_case(run_exact("cpu", True, tmp_path / "exact.json", time.monotonic() + 100))
    assert rows["generate", "exact"].extra["logprob_gap_max"] == pytest.approx(0.25, abs=1e-5)
    assert rows["generate", "exact"].extra["share_of_equal_tokens"] == 0
