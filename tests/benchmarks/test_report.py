"""`report`: the documentation holds what the result files say, and plots what they measured."""

import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.plots import bar_plot, log_plot
from benchmarks.report import File
from benchmarks.results import ROOT, Row, load
from benchmarks.timing import Timing
from fastrl.report_svg import Series

RESULTS = ROOT / "benchmarks/results"


def test_the_documentation_holds_what_the_result_files_say(tmp_path: Path) -> None:
    """What `python -m benchmarks report` would write is there already."""
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    shutil.copytree(ROOT / "docs/plots", tmp_path / "docs/plots")
    changed = [str(path.relative_to(tmp_path)) for path in report.run_report(RESULTS, tmp_path)]
    assert changed == [], f"run `python -m benchmarks report` and commit: {changed}"
    drawn = set(report.plots(report.read_files(RESULTS)))
    assert {path.stem for path in (ROOT / "docs/plots").glob("*.svg")} == drawn
    page = (ROOT / "docs/measured.md").read_text()
    shown = set(re.findall(r"!\[\w+\]\(plots/(\w+)\.svg\)", page))
    assert shown == drawn


def test_a_figure_that_is_changed_by_hand_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for page in report.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    text = (tmp_path / "README.md").read_text()
    figure = re.search(r"\| (\d\.\d\d) \|", text)
    assert figure is not None
    (tmp_path / "README.md").write_text(text.replace(figure[0], "| 9.99 |"))
    assert tmp_path / "README.md" in report.run_report(RESULTS, tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_a_page_without_marks_is_an_error() -> None:
    with pytest.raises(SystemExit, match="measured: peers"):
        report.written("# A page", "peers", "a table")


def row(workload: str, case: str, seconds: float, sizes: dict[str, int], provider: str = "fastrl",
        peak: int | None = None, **extra: object) -> Row:
    blank = Row(workload=workload, case=case, sizes=sizes, dtype="float32", provider=provider,
                status="checked", reason="not timed", extra=extra)
    return blank.timed(Timing("clock", [seconds]), peak, None, None)


def file(topic: str, rows: list[Row], ceilings: dict[str, object] | None = None) -> File:
    return File(f"{topic}.json", {
        "topic": topic, "date": "2026-11-24", "device": {"name": "a processor"},
        "ceilings": {"measured": ceilings}}, rows)


def points(svg: str) -> list[tuple[float, float]]:
    """Where the markers of the data are; those of the legend are below."""
    ElementTree.fromstring(svg)
    found = re.findall(r'transform="translate\(([\d.]+) ([\d.]+)\)"', svg)
    return [(float(x), float(y)) for x, y in found if float(y) < 340]


def test_the_table_of_peers() -> None:
    sizes = {"B": 4}
    rows = [row("generate", "equal", 1.0, sizes, num_threads=1, tokens_per_s=4000, ratio=2.5,
                processor_ratio=2.4),
            row("generate", "equal", 2.5, sizes, "other", num_threads=1, tokens_per_s=1600,
                ratio=1.0, processor_ratio=1.0),
            row("generate", "equal", 9.0, sizes, "other", num_threads=2, tokens_per_s=444),
            row("generate", "mixed", 1.0, sizes, num_threads=1, tokens_per_s=4000, ratio=2.5,
                processor_ratio=2.4, ratio_to_other_plain=3.5, processor_ratio_to_other_plain=3.4),
            row("generate", "mixed", 3.5, sizes, "other_plain", num_threads=1, tokens_per_s=1142,
                ratio=0.7, processor_ratio=0.7),
            row("ppo", "ppo_cpu", 1.0, sizes, peak=2**30, response_tokens_per_s=10.0),
            row("ppo", "ppo_cpu", 3.0, sizes, "trl", peak=3 * 2**30, response_tokens_per_s=3.3,
                ratio=3.0, processor_ratio=2.9)]
    lines = report.peers_table([file("some", rows)]).splitlines()[2:]
    assert lines == [
        "| [generate equal, 1 thread]({results}/some.json) | 4,000 | 1,600 | other | 2.50 | 2.40 |"
        "  |",
        "| [generate mixed, 1 thread]({results}/some.json) | 4,000 | 1,142 | other_plain | 3.50 | "
        "3.40 |  |",
        "| [ppo cpu]({results}/some.json) | 10 | 3 | trl | 3.00 | 2.90 | 1.00 and 3.00 GiB |"]
    assert report.peers_table([]) == "Not yet measured."


def test_the_plot_of_a_scaling_run_shows_each_doubling_below_the_limit() -> None:
    rows = [row("train", "batch", 1.0 * 2.1**i, {"B": 16 * 2**i, "S": 64}, tokens_per_s=5.0 + i,
                peak=2**20 * 2**i, **({"doubling": 2.1, "limit": 2.2} if i else {}))
            for i in range(3)]
    length = [replace(r, case="length", sizes={"B": 16, "S": 64 * 2**i})
              for i, r in enumerate(rows)]
    files = [file("scaling", [*rows, *length])]
    drawn = report.plots(files)
    assert set(drawn) == {"tokens_per_s", "memory", "scaling_train"}
    # Markers of equal growth stand on one line; the last, 2.1^2, is above 2^2 and below 2.2^2.
    first, second, third = points(drawn["scaling_train"])[:3]
    assert second[0] - first[0] == pytest.approx(third[0] - second[0], abs=0.2)
    assert second[1] - first[1] == pytest.approx(third[1] - second[1], abs=0.2)
    limit = re.findall(r'd="M([^"]+)" fill="none" stroke="#808080"', drawn["scaling_train"])[0]
    assert float(limit.split("L")[-1].split()[1]) < third[1]
    assert report.doublings_table(files).splitlines()[2:] == [
        "| train | batch | 2.10, 2.10 | 2.20, 2.20 |",
        "| train | length | 2.10, 2.10 | 2.20, 2.20 |"]


def test_the_roofline_has_a_point_for_each_row_and_the_ceilings() -> None:
    def op(provider: str, seconds: float) -> Row:
        made = row("op", "", seconds, {"M": 1}, provider)
        return replace(made, bytes=10**9, flops=10**11, share_of_floor=0.5)

    ceilings = {"bytes_per_s": 1e10, "flops_per_s": 1e12, "product_dtype": "float32"}
    rows = [op("torch", 0.4), op("triton", 0.2)]
    svg = report.plots([file("kernels", rows, ceilings)])["roofline"]
    (x, slow), (same_x, fast) = points(svg)
    assert x == same_x and fast < slow  # twice as fast is higher
    corner = re.findall(r'd="M([^"]+)" fill="none" stroke="#808080"', svg)[0].split("L")[1]
    # 100 operations per byte is where the two ceilings meet: 1e12 / 1e10; 0.5e12 is below 1e12.
    assert float(corner.split()[0]) == pytest.approx(x, abs=0.2)
    assert float(corner.split()[1]) < fast


def test_bars_are_as_long_as_their_phases() -> None:
    rows = [row("ppo", "ppo_cpu", 6.0, {"B": 4},
                phases_s={"rollout_s": 2.0, "policy_update_s": 4.0, "step_s": 6.0}),
            row("ppo", "ppo_cpu", 9.0, {"B": 4}, "trl")]
    svg = report.plots([file("ppo", rows)])["phases"]
    ElementTree.fromstring(svg)
    widths = [float(width) for width in re.findall(r"h([\d.]+)v22", svg)]
    assert widths[1] / widths[0] == pytest.approx(2.0, rel=0.01)
    assert widths[2] / widths[0] == pytest.approx(4.5, rel=0.01)
    assert "step" not in svg.replace("rollout", "")


def test_what_cannot_be_drawn_is_refused() -> None:
    for series in ([], [Series("zero", (1.0,), (0.0,))]):
        with pytest.raises(ValueError, match="positive coordinates"):
            log_plot("A title", series, "x", "y")
    with pytest.raises(ValueError, match="some length"):
        bar_plot("A title", {}, "s")


def test_the_newest_file_of_a_topic_counts(tmp_path: Path) -> None:
    document, _ = load(RESULTS / "ppo_cpu_20261124.json")
    text = (RESULTS / "ppo_cpu_20261124.json").read_text()
    (tmp_path / "b.json").write_text(text)
    (tmp_path / "a.json").write_text(text.replace(document["date"], "2027-01-01T00:00:00+00:00"))
    assert [f.name for f in report.read_files(tmp_path)] == ["a.json"]
