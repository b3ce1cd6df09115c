"""`compare`: a planted slowdown is caught, reruns are silent, and what cannot be said is not."""

import itertools
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, pairs, results
from benchmarks.compare import compare_files, compare_rows, median_interval
from benchmarks.results import ROOT, Row
from benchmarks.timing import Timing, interleaved, sampler

DOCUMENT = {
    "schema": 1, "topic": "op", "date": "", "command": "", "commit": "", "has_changes": None,
    "source_sha256": "", "device": {"name": "a processor"}, "versions": {}, "ceilings": {},
    "rows": []}


def row(seconds: Sequence[float], turns: str | None = "one", **changes: object) -> Row:
    """An op's row with these samples."""
    base = Row(workload="op", sizes={"M": 4}, dtype="float32", provider="torch", status="checked",
               reason="not timed")
    timed = base.timed(Timing("processor_time", list(seconds)), 8, None, None)
    return replace(timed, **{"extra": {"turns": turns} if turns else {}, **changes})


def write(path: Path, *rows: Row, **changes: object) -> Path:
    results.save({**DOCUMENT, **changes}, list(rows), path)
    return path


def run(*arguments: object) -> int:
    """Exit status of the command line."""
    saved, sys.argv = sys.argv, ["benchmarks", *map(str, arguments)]
    try:
        return __main__.main()
    finally:
        sys.argv = saved


def test_a_planted_slowdown_is_caught_and_ten_reruns_are_silent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log-softmax, in pairs with itself and with itself on a fifth more rows.

    Short calls: another process gets between few of them.
    """
    values = torch.randn(60, 2000)

    def timed(rows: dict[str, int]) -> list[Path]:
        samplers = {name: sampler([lambda n=n: torch.log_softmax(values[:n], -1)], "cpu")
                    for name, n in rows.items()}
        times = interleaved(samplers, seconds_each=0.0, min_rounds=150)
        return [write(tmp_path / f"{name}.json", row(one.seconds)) for name, one in times.items()]

    timed({"before": 50, "after": 50})  # warms up
    for _ in range(10):
        assert run("compare", *timed({"before": 50, "after": 50})) == 0
        assert "1 rows: 0 broken, 0 slower" in capsys.readouterr().out
    assert run("compare", *timed({"before": 50, "after": 60})) == 1
    assert "1 rows: 0 broken, 1 slower" in capsys.readouterr().out


def recorded(rng: random.Random, factor: float, drift: float) -> tuple[list[float], list[float]]:
    """Pairs on a machine that gets slower, with a rare sample that took twice as long."""
    before, after = [], []
    for i in range(31):
        machine = 1e-3 * (1 + drift * i / 31)
        for times, work in ((before, 1.0), (after, factor)):
            hiccup = 2.0 if rng.random() < 0.1 else 1.0
            times.append(machine * work * hiccup * rng.lognormvariate(0, 0.03))
    return before, after


def test_pairs_see_through_drift_and_outliers() -> None:
    rng = random.Random(0)
    verdicts = {factor: [compare_rows(*map(row, recorded(rng, factor, drift))).verdict
                         for drift in (0.0, 1.0) for _ in range(200)]
                for factor in (1.0, 1.2, 1 / 1.2)}
    assert set(verdicts[1.0]) == {"same"}
    assert verdicts[1.2].count("slower") > 390 and "faster" not in verdicts[1.2]
    assert verdicts[1 / 1.2].count("faster") > 390


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    # n = 8: smallest and largest value; P(outside) = 2 / 2^8. n = 15: (1 + 15 + 105) / 2^14 = .7%.
    assert median_interval([3, 1, 2, 8, 5, 7, 6, 4]) == (1, 8)
    assert median_interval(range(1, 16)) == (3, 13)
    rng, inside = random.Random(1), 0
    for _ in range(4000):
        low, high = median_interval([rng.expovariate(1.0) for _ in range(15)])
        inside += low <= 0.6931 <= high
    assert 0.988 < inside / 4000 < 0.997  # exactly 1 - 121 / 2^14 = .9926
    with pytest.raises(ValueError, match="at least 8 values, got 7"):
        median_interval(range(7))


def test_without_pairs_only_what_hardly_overlaps_is_a_change() -> None:
    before = row([1.0, 1.1, 1.2], turns=None)
    assert compare_rows(before, row([1.2, 1.3, 1.4], turns=None)).verdict == "same"
    assert compare_rows(before, row([1.3, 1.4, 1.5], turns=None)).verdict == "slower"
    assert compare_rows(row([1.3, 1.4, 1.5], turns=None), before).verdict == "faster"


@pytest.mark.parametrize("after, reason", [
    (row([2.0], turns=None), "one sample"),
    (row([2.0, 2.0], turns=None, timer="clock"), "timed in other ways"),
])
def test_what_cannot_be_told_has_a_reason(after: Row, reason: str) -> None:
    change = compare_rows(row([1.0, 1.0], turns=None), after)
    assert (change.verdict, change.reason, change.ratio) == ("none", reason, 2.0)


def test_few_pairs_and_samples_of_other_turns_are_no_pairs() -> None:
    few = compare_rows(row([1.0] * 7), row([2.0] * 7))
    assert (few.verdict, few.reason) == ("none", "7 pairs, 8 are needed")
    # As pairs these are equal to 1%; the samples of other turns are not compared one by one.
    rising = [1.0, 1.5, 2.0] * 4
    assert compare_rows(row(rising), row(rising, "other")).interval != (1.0, 1.0)
    assert compare_rows(row(rising), row(rising)).interval == (1.0, 1.0)


def test_another_machine_gives_ratios_and_no_verdict(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.json", row([t, t], turns=None), device={"name": name})
             for name, t in (("one", 1.0), ("other", 2.0))]
    (change,) = compare_files(*paths)
    assert (change.verdict, change.reason, change.ratio) == ("none", "another machine", 2.0)


def test_a_figure_that_is_lost_to_a_fault_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = write(tmp_path / "a.json", row([1.0] * 9))
    fields = {"workload": "op", "sizes": {"M": 4}, "dtype": "float32", "provider": "torch"}
    for status, expected in (("wrong", 1), ("error", 1), ("skipped", 0), ("unavailable", 0)):
        after = write(tmp_path / "b.json", Row(**fields, status=status, reason="because"))
        assert run("compare", before, after) == expected
        assert f"{status}: because" in capsys.readouterr().out


def test_rows_of_one_file_only_are_named(tmp_path: Path) -> None:
    common, gone, new = row([1.0] * 9), row([1.0], case="gone"), row([1.0], case="new")
    changes = compare_files(write(tmp_path / "a.json", common, gone),
                            write(tmp_path / "b.json", common, new))
    assert {c.name: c.reason for c in changes} == {
        "op": "", "op gone": "only before", "op new": "only after"}


def test_files_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good.json", row([1.0] * 9))
    other = write(tmp_path / "other.json", row([1.0] * 9, workload="else"), topic="else")
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps({"rows": []}))
    for path, message in ((tmp_path / "absent.json", "found none"), (broken, "no result file"),
                          (other, "no row in common")):
        with pytest.raises(SystemExit, match=message):
            compare_files(good, path)


def test_files_that_were_written_before_samples_were_kept_are_read() -> None:
    path = ROOT / "benchmarks/results/linear_policy_loss_cpu_20261124.json"
    changes = compare_files(path, path)
    assert {change.verdict for change in changes} == {"same"} and len(changes) == 2


def test_a_part_runs_in_two_trees_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The revision is really checked out; what a process finds is given."""
    order: list[Path] = []
    slow = itertools.cycle([1.0, 1.01, 0.99])

    def run_part(tree: Path, part: Sequence[str]) -> pairs.Run:
        assert part == ["kernels", "--ops", "gae"] and (tree / "benchmarks/kernels.py").exists()
        order.append(tree)
        return dict(DOCUMENT), [row([(1.3 if tree == ROOT else 1.0) * next(slow)], turns=None)]

    monkeypatch.setattr(pairs, "run_part", run_part)
    status = run("pairs", "--base", "HEAD", "--turns", 8, "--out", tmp_path, "kernels", "--ops",
                 "gae")
    assert status == 1 and "1 slower" in capsys.readouterr().out
    (base,) = set(order) - {ROOT}
    assert order == [base, ROOT, ROOT, base] * 4 and not base.exists()


def test_a_row_that_one_turn_lacks_has_no_figure() -> None:
    lost = row([1.0], turns=None).without_figure("error", "raised")
    _, (merged,) = pairs.merged([({}, [row([1.0])]), ({}, [lost])], "one")
    assert (merged.status, merged.reason, merged.median_s) == ("error", "raised", None)
    _, (merged,) = pairs.merged([({}, [row([1.0])]), ({}, [])], "one")
    assert (merged.reason, merged.median_s) == ("not in every turn", None)


def test_a_process_of_a_tree_measures_that_tree(tmp_path: Path) -> None:
    document, (found, *_) = pairs.run_part(ROOT, [
        "kernels", "--device", "cpu", "--small", "--ops", "masked_mean", "--providers", "torch"])
    assert found.workload == "masked_mean" and len(found.samples_s) == found.rounds >= 5
    with pytest.raises(SystemExit, match="no bench of nothing"):
        pairs.run_part(ROOT, ["kernels", "--device", "cpu", "--ops", "nothing"])


@pytest.mark.parametrize("arguments, message", [
    (["--turns", "7", "kernels"], "at least 8, got 7"),
    ([], "a part that measures"),
    (["compare"], "a part that measures"),
])
def test_pairs_that_say_nothing_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run("pairs", *arguments)


def test_a_revision_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="git worktree add .* no-such-revision"):
        run("pairs", "--base", "no-such-revision", "--out", tmp_path, "kernels")
