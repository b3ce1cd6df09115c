"""`python -m benchmarks exact` at small sizes: what its rows say, and that it says what fails."""

import time
from pathlib import Path

import pytest
import torch

import benchmarks.exact as bench
from benchmarks.exact import run_exact
from benchmarks.results import Row, load


def by_case(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(row.workload, row.case): row for row in rows}


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    path = tmp_path / "exact.json"
    rows = by_case(run_exact("cpu", True, path, time.monotonic() + 100))
    assert by_case(load(path)[1]).keys() == rows.keys()
    assert rows["sweep", ""].extra == {"num_lines": 10, "failed": []}
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
    # 102 tokens of two layers with two KV heads of 8 in float32.
    assert held.extra["cache_bytes"] == 102 * 2 * 2 * 2 * 8 * 4
    assert held.peak_bytes is not None and free.peak_bytes is not None
    assert held.extra["largest_microbatch_tokens"] == 64


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
    assert {row.reason for row in rest} == {"the time is used up"} and len(rest) == 3


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
