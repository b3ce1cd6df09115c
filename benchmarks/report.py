"""`python -m benchmarks report`: tables and plots of the documentation, from the result files.

The newest file of each topic and kind of device counts. README.md and docs/ hold what comes out
between two marks each, docs/plots/ the plots; a test compares them with what this writes now.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import model
from benchmarks.plots import bar_plot, log_plot
from benchmarks.results import Row, load, time_text
from fastrl.report_svg import Series

BEGIN, END = "<!-- measured: {} -->", "<!-- measured: end -->"
PAGES = {"README.md": "peers", "docs/measured.md": "everything", "docs/step_time.md": "step time"}
"""Page -> what it holds of the results."""
COMMANDS = {
    "roofline": "benchmarks/gpu.sh, or python -m benchmarks kernels",
    "tokens_per_s": "python -m benchmarks scaling",
    "scaling_generate": "python -m benchmarks scaling",
    "scaling_train": "python -m benchmarks scaling",
    "phases": "python -m benchmarks.bench_ppo",
    "memory": "python -m benchmarks scaling",
}
"""Plot -> what measures it."""
MAX_STYLES = 6


@dataclass(frozen=True)
class File:
    """A result file."""

    name: str
    document: dict[str, Any]
    rows: list[Row]


def read_files(folder: Path) -> list[File]:
    """The newest result file of each topic and device name, by file name."""
    files = [File(path.name, *load(path)) for path in sorted(folder.glob("*.json"))]
    newest = {(f.document["topic"], f.document["device"]["name"]): f
              for f in sorted(files, key=lambda f: str(f.document["date"]))
              if "turns" not in str(f.rows[:1])}
    return sorted(newest.values(), key=lambda f: f.name)


def peers_table(files: Sequence[File]) -> str:
    """Markdown: a line for each workload that fastrl and a peer have measured in one run."""
    lines = ["| | fastrl, tokens/s | peer, tokens/s | | times as fast | by processor time | memory "
             "|",
             "|---|---:|---:|---|---:|---:|---|"]
    for file in files:
        for own in (row for row in file.rows if row.provider == "fastrl"):
            for peer in (row for row in file.rows if _is_peer(own, row)):
                threads = own.extra.get("num_threads")
                label = f"{own.workload} {own.case.removeprefix(own.workload + '_')}" + (
                    f", {threads} thread{'s' if threads > 1 else ''}" if threads else "")
                memory = "" if not (own.peak_bytes and peer.peak_bytes) else (
                    f"{own.peak_bytes / 2**30:.2f} and {peer.peak_bytes / 2**30:.2f} GiB")
                lines.append(
                    f"| [{label}]({{results}}/{file.name}) | {_tokens_per_s(own)} | "
                    f"{_tokens_per_s(peer)} | {peer.provider} | {_ratio('ratio', own, peer)} | "
                    f"{_ratio('processor_ratio', own, peer)} | {memory} |")
    return "\n".join(lines) if len(lines) > 2 else "Not yet measured."


def _ratio(name: str, own: Row, peer: Row) -> str:
    """The peer's time over fastrl's, which one of the two rows holds; the other has 1.

    Where there are several peers, fastrl's row names the peer.
    """
    to_peer = own.extra.get(f"{name}_to_{peer.provider}")
    if to_peer is not None:
        return f"{to_peer:.2f}"
    found = [row.extra[name] for row in (own, peer) if row.extra.get(name, 1.0) != 1.0]
    return f"{found[0] if found else 1.0:.2f}"


def _is_peer(own: Row, row: Row) -> bool:
    """True for another trainer's figure on the same workload."""
    same = ("workload", "case", "sizes", "dtype")
    return (not row.provider.startswith("fastrl") and row.median_s is not None
            and own.median_s is not None and _tokens_per_s(row) != ""
            and all(getattr(own, name) == getattr(row, name) for name in same)
            and own.extra.get("num_threads") == row.extra.get("num_threads"))


def _tokens_per_s(row: Row) -> str:
    found = row.extra.get("tokens_per_s", row.extra.get("response_tokens_per_s"))
    return "" if found is None else f"{found:,.0f}"


def kernels_table(files: Sequence[File]) -> str:
    """Markdown: ops by provider, with their share of the floor and memory."""
    lines = ["| op | sizes | provider | time | share of floor | extra memory | device |",
             "|---|---|---|---:|---:|---:|---|"]
    for file in files:
        for row in file.rows:
            if row.share_of_floor is not None and row.median_s is not None:
                sizes = " ".join(f"{k}={v}" for k, v in row.sizes.items())
                memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f} MiB"
                lines.append(
                    f"| {f'{row.workload} {row.case}'.strip()} | {sizes} {row.dtype} | "
                    f"{row.provider} | {time_text(row.median_s)} | {row.share_of_floor:.0%} | "
                    f"{memory} | {file.document['device']['name']} |")
    return "\n".join(lines) if len(lines) > 2 else "Not yet measured."


def doublings_table(files: Sequence[File]) -> str:
    """Markdown: what each doubling costs, and what it may."""
    rows = [row for file in files for row in file.rows if "doubling" in row.extra]
    if not rows:
        return "Not yet measured: `python -m benchmarks scaling`."
    lines = ["| workload | doubled | times as long, doubling by doubling | allowed |",
             "|---|---|---|---|"]
    for workload, axis in dict.fromkeys((row.workload, row.case) for row in rows):
        same = [row.extra for row in rows if (row.workload, row.case) == (workload, axis)]
        lines.append(f"| {workload} | {axis} | "
                     + ", ".join(f"{extra['doubling']:.2f}" for extra in same) + " | "
                     + ", ".join(f"{extra['limit']:.2f}" for extra in same) + " |")
    return "\n".join(lines)


def plots(files: Sequence[File]) -> dict[str, str]:
    """The plots for which there are figures: name -> SVG."""
    scaling = [row for file in files for row in file.rows if row.extra.get("doubling")
               or file.document["topic"] == "scaling"]
    made = {"roofline": _roofline(files), "tokens_per_s": _tokens(files, scaling),
            "phases": _phases(files), "memory": _memory(scaling)}
    for workload in ("generate", "train"):
        made[f"scaling_{workload}"] = _scaling(workload, scaling)
    return {name: text for name, text in made.items() if text}


def _roofline(files: Sequence[File]) -> str:
    points, guides = [], []
    for file in files:
        ceilings = file.document["ceilings"]["measured"]
        rows = [row for row in file.rows if row.bytes and row.flops and row.median_s
                and row.share_of_floor is not None]
        if not ceilings or not rows:
            continue
        for row in rows:
            assert row.median_s is not None
            points.append((f"{row.workload} {row.provider}", row.flops / row.bytes,
                           row.flops / row.median_s / 1e9))
        rate, bandwidth = ceilings["flops_per_s"] / 1e9, ceilings["bytes_per_s"] / 1e9
        xs = (min(x for _, x, _ in points) / 4, rate / bandwidth,
              max(rate / bandwidth, max(x for _, x, _ in points)) * 2)
        guides.append(Series(f"ceiling of {file.document['device']['name']}", xs,
                             tuple(min(rate, x * bandwidth) for x in xs)))
    if not points:
        return ""
    series = [Series(name, (x,), (y,), index % MAX_STYLES)
              for index, (name, x, y) in enumerate(points)]
    return log_plot("Operations beside the machine's ceiling", series,
                    "operations per byte of an ideal kernel", "GFLOP/s", guides=guides,
                    joined=False)


def _lines(rows: Iterable[Row], letter: str, y: Any) -> list[Series]:
    """A line for each workload, against one size."""
    by_name: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        by_name.setdefault(row.workload, []).append((row.sizes[letter], y(row)))
    return [Series(name, *(tuple(axis) for axis in zip(*sorted(points), strict=True)), index)
            for index, (name, points) in enumerate(by_name.items())]


def _tokens(files: Sequence[File], scaling: Sequence[Row]) -> str:
    engine = [row for file in files for row in file.rows
              if file.document["topic"] == "engine" and row.provider == "fastrl"
              and row.case == "equal 1 each" and row.sizes["P"] == 128 and row.median_s]
    rows = [*(row for row in scaling if row.case == "batch"), *engine]
    return log_plot("Tokens per second against batch", _lines(
        rows, "B", lambda row: row.extra["tokens_per_s"]), "sequences", "tokens/s",
        base=2) if rows else ""


def _memory(scaling: Sequence[Row]) -> str:
    rows = [row for row in scaling if row.case == "length" and row.peak_bytes]
    return log_plot("Memory of a call against length", _lines(
        rows, "S", lambda row: (row.peak_bytes or 0) / 2**20), "tokens of a sequence",
        "MiB beyond what was there", base=2) if rows else ""


def _phases(files: Sequence[File]) -> str:
    bars = {}
    for file in files:
        for row in file.rows:
            phases = {name.removesuffix("_s").replace("_", " "): seconds
                      for name, seconds in row.extra.get("phases_s", {}).items()
                      if name != "step_s"}
            if row.provider != "fastrl" and row.workload == "ppo" and row.median_s:
                phases = {"whole iteration of a peer": row.median_s}
            if phases and row.workload == "ppo":
                bars[f"{row.provider} {row.case.removeprefix('ppo_')}"] = phases
    return bar_plot("A PPO iteration by phase", bars, "s") if bars else ""


def _scaling(workload: str, scaling: Sequence[Row]) -> str:
    """Time over that of the smallest size, against how often as large the doubled one is."""
    by_axis: dict[str, list[Row]] = {}
    for row in scaling:
        if row.workload == workload and row.median_s is not None:
            by_axis.setdefault(row.case, []).append(row)
    if not by_axis:
        return ""
    series = []
    for index, (axis, rows) in enumerate(by_axis.items()):
        base = rows[0].median_s or 1.0
        series.append(Series(axis, tuple(2.0**i for i in range(len(rows))),
                             tuple((row.median_s or 0.0) / base for row in rows), index))
    largest = max(line.xs[-1] for line in series)
    steps = tuple(2.0**i for i in range(int(largest).bit_length()))
    guide = Series("linear, and 10% at each doubling", steps,
                   tuple(2.2**i for i in range(len(steps))))
    return log_plot(f"Time of `{workload}` when one size doubles", series, "times as large",
                    "times as long", base=2, guides=[guide])


def parts(folder: Path, drawn: dict[str, str], where: str) -> dict[str, str]:
    """What the pages hold, by name.

    Args:
        where: Folder of the results as seen from the page.
    """
    files = read_files(folder)
    peers = peers_table(files).replace("{results}", where)
    figures = [f"![{name}](plots/{name}.svg)" if name in drawn
               else f"Plot `{name}`: not yet measured; `{COMMANDS[name]}`." for name in COMMANDS]
    return {
        "peers": peers,
        "everything": "\n\n".join([
            "## Beside others", peers, "## Operations", kernels_table(files),
            "## When a size doubles", doublings_table(files), "## Plots", *figures]),
        "step time": model.markdown(folder, model.Cluster()),
    }


def written(text: str, name: str, part: str) -> str:
    """A page with `part` between its marks.

    Raises:
        SystemExit: when the page does not have the marks.
    """
    begin = BEGIN.format(name)
    pattern = re.compile(re.escape(begin) + r"\n.*?" + re.escape(END), re.S)
    if len(pattern.findall(text)) != 1:
        raise SystemExit(f"expected {begin} and {END} once in the page, found none or several")
    return pattern.sub(lambda _: f"{begin}\n{part}\n{END}", text)


def run_report(results: Path, root: Path) -> list[Path]:
    """Write pages and plots below `root`; returns the files that changed."""
    drawn = plots(read_files(results))
    texts = {root / "docs/plots" / f"{name}.svg": text for name, text in drawn.items()}
    for page, name in PAGES.items():
        where = "benchmarks/results" if "/" not in page else "../benchmarks/results"
        text = (root / page).read_text("utf-8")
        texts[root / page] = written(text, name, parts(results, drawn, where)[name])
    changed = []
    for path, text in texts.items():
        if not path.exists() or path.read_text("utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
            changed.append(path)
    return changed
