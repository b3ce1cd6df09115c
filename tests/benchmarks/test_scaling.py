"""`scaling`: what it doubles, what a doubling may cost, and the file that it writes."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__, scaling
from benchmarks.results import Row, load
from benchmarks.scaling import AXES, BASE, SMALL, Sizes, beyond_limit, limit
from benchmarks.timing import Timing


def test_a_doubling_may_cost_ten_percent_more_and_attention_its_share() -> None:
    for letter in ("B", "V", "L"):
        larger = replace(BASE, **{letter: 2 * getattr(BASE, letter)})
        assert limit("train", BASE, larger) == pytest.approx(2.2, rel=1e-3)
    # A decode step is bound by bytes: weights once a step (twice the steps), the cache (16 rows,
    # 1,728 numbers a token) with the square, logits (8,000 a token, written and read) twice.
    def read(S: int) -> float:
        steps = S // 2
        cached = 16 * (steps * steps + steps * (steps - 1) // 2)
        return 4 * (steps * (2_985_984 + 2_304_000) + cached * 1728) + 8 * 16 * steps * 8000

    assert limit("generate", Sizes(S=256), Sizes(S=512)) == pytest.approx(
        1.1 * read(512) / read(256), rel=1e-6)
    # 288 of width: a token multiplies 2.98M weights of layers and 2.3M of the head, and attends
    # 2 * 3 * 288 numbers for each of (S + 1) / 2 tokens on average.
    def per_token(S: int) -> float:
        return S * (2_985_984 + 2_304_000 * (S - 1) / S + 2 * 3 * 288 * (S + 1) / 2)

    assert limit("train", Sizes(S=1024), Sizes(S=2048)) == pytest.approx(
        1.1 * per_token(2048) / per_token(1024), rel=1e-6)


def test_a_doubling_beyond_its_limit_is_named_and_sets_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def row(doubling: float) -> Row:
        blank = Row(workload="train", case="batch", sizes={"B": 4}, dtype="float32",
                    provider="fastrl", status="checked", reason="not timed",
                    extra={"doubling": doubling, "limit": 2.2})
        return blank.timed(Timing("processor_time", [1.0]), 1, None, None)

    assert beyond_limit([row(2.2)]) == []
    (line,) = beyond_limit([row(2.1), row(2.3)])
    assert "2.3 times as long" in line and "2.2 allowed" in line
    for doubling, status in ((2.1, 0), (2.3, 1)):
        monkeypatch.setattr(scaling, "run_scaling", lambda *_, d=doubling: [row(d)])
        monkeypatch.setattr("sys.argv", ["benchmarks", "scaling", "--out", str(tmp_path)])
        assert __main__.main() == status
    assert "allowed" in capsys.readouterr().out


def test_the_flow_at_small_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "AXES", {"length": ("S", 2), "layers": ("L", 2)})
    rows = scaling.run_scaling(small=True, rounds=2, path=tmp_path / "file.json")
    document, saved = load(tmp_path / "file.json")
    assert saved == rows and document["ceilings"]["measured"] is not None
    assert [(r.workload, r.case, r.sizes["S"], r.sizes["L"]) for r in rows] == [
        (workload, case, S, L) for workload in ("generate", "train")
        for case, S, L in (("length", 16, 2), ("length", 32, 2), ("layers", 16, 2),
                           ("layers", 16, 4))]
    assert all(row.status == "ok" and row.rounds == 2 and row.flops > 0 for row in rows)
    assert [("doubling" in row.extra) for row in rows] == [False, True] * 4
    assert set(AXES) == {"batch", "length", "vocabulary", "layers"} and SMALL.S == 16
