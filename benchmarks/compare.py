"""`python -m benchmarks compare A.json B.json`: what became slower, beyond noise.

Rows that took turns (`python -m benchmarks pairs`) are compared pair by pair: sample i of one was
taken beside sample i of the other, so what the machine does meets both. The median of the ratios is
given with an interval of order statistics that holds it with 99%, whatever the distribution; a
change counts when the whole interval lies beyond MIN_CHANGE. Files of two runs have no pairs: there
a change counts when the samples hardly overlap, which small changes never do.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Row, load, time_text

MIN_CHANGE = 0.05
"""What is smaller is no change, however sure."""
MIN_PAIRS = 8
"""With fewer no interval of order statistics holds the median with 99%."""
CONFIDENCE = 0.99
COMMON = ("name", "system", "threads", "driver")
"""Facts of a device that have to agree."""
LOSSES = ("slower", "broken")
"""Verdicts that make a comparison fail."""
Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """One row in two files."""

    name: str
    provider: str
    verdict: str
    """slower, faster, same, broken (no figure any more, for a fault), or none."""
    before: Row | None = None
    after: Row | None = None
    ratio: float | None = None
    """Time after over time before."""
    interval: tuple[float, float] | None = None
    reason: str = ""
    """Why there is no verdict, or what is broken."""


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of the distribution with at least CONFIDENCE.

    The k-th smallest and the k-th largest value, for the largest k with
    2 P(Binomial(n, 1/2) < k) <= 1 - CONFIDENCE.

    Raises:
        ValueError: below MIN_PAIRS values.
    """
    n, ordered = len(values), sorted(values)
    if n < MIN_PAIRS:
        raise ValueError(f"expected at least {MIN_PAIRS} values, got {n}")
    below, k = 0.0, 0
    while below + math.comb(n, k) / 2**n <= (1 - CONFIDENCE) / 2:
        below, k = below + math.comb(n, k) / 2**n, k + 1
    return ordered[k - 1], ordered[n - k]


def compare_rows(before: Row, after: Row, same_device: bool = True) -> Change:
    """The verdict on one row."""
    named = {"name": title(before), "provider": before.provider, "before": before, "after": after}
    if after.median_s is None:
        is_fault = before.median_s is not None and after.status in ("wrong", "error")
        return Change(**named, verdict="broken" if is_fault else "none",
                      reason=f"{after.status}: {after.reason}")
    if before.median_s is None:
        return Change(**named, verdict="none", reason=f"before {before.status}: {before.reason}")
    turns = before.extra.get("turns")
    if turns is not None and turns == after.extra.get("turns"):
        ratios = [b / a for a, b in zip(before.samples_s, after.samples_s, strict=True)]
        ratio = statistics.median(ratios)
        if len(ratios) < MIN_PAIRS:
            return Change(**named, verdict="none", ratio=ratio,
                          reason=f"{len(ratios)} pairs, {MIN_PAIRS} are needed")
        low, high = median_interval(ratios)
        return Change(**named, verdict=_verdict(low, high), ratio=ratio, interval=(low, high))
    assert before.p10_s and before.p90_s and after.p10_s and after.p90_s
    ratio = after.median_s / before.median_s
    reason = ("another machine" if not same_device
              else "timed in other ways" if before.timer != after.timer
              else "one sample" if min(before.rounds, after.rounds) < 2 else "")
    low, high = after.p10_s / before.p90_s, after.p90_s / before.p10_s
    return Change(**named, verdict="none" if reason else _verdict(low, high), ratio=ratio,
                  interval=None if reason else (low, high), reason=reason)


def _verdict(low: float, high: float) -> str:
    if low > 1 + MIN_CHANGE:
        return "slower"
    return "faster" if high < 1 / (1 + MIN_CHANGE) else "same"


def compare_files(before: Path, after: Path) -> list[Change]:
    """One change for each row of either file.

    Raises:
        SystemExit: when a file cannot be read, or no row is in both.
    """
    (first, old), (second, new) = (_load(path) for path in (before, after))
    same = all(first["device"].get(fact) == second["device"].get(fact) for fact in COMMON)
    before_rows, after_rows = ({key_of(row): row for row in rows} for rows in (old, new))
    if not before_rows.keys() & after_rows.keys():
        raise SystemExit(f"{before} ({first['topic']}) and {after} ({second['topic']}) have no row "
                         f"in common: compare two files of one topic, device and size")
    changes = []
    for key in {**before_rows, **after_rows}:
        a, b = before_rows.get(key), after_rows.get(key)
        if a is not None and b is not None:
            changes.append(compare_rows(a, b, same))
        elif a is not None:
            changes.append(Change(title(a), a.provider, "none", before=a, reason="only before"))
        elif b is not None:
            changes.append(Change(title(b), b.provider, "none", after=b, reason="only after"))
    return changes


def _load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    if not path.is_file():
        raise SystemExit(f"expected a result file, found none: {path}")
    try:
        return load(path)
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is no result file: {error}") from error


def key_of(row: Row) -> Key:
    """What tells the rows of a file apart."""
    return (row.workload, row.case, tuple(sorted(row.sizes.items())), row.dtype, row.provider,
            row.extra.get("num_threads"))


def title(row: Row) -> str:
    """Workload, case and, where the file has several, number of threads."""
    threads = row.extra.get("num_threads")
    return " ".join(x for x in (row.workload, row.case, threads and f"{threads} threads") if x)


def changes_table(changes: Sequence[Change]) -> str:
    """A line per row, what became slower first, and a line that counts."""
    order = ("broken", "slower", "faster", "same", "none")
    lines = [("verdict", "ratio", "99% interval", "before", "after", "memory", "provider", "row")]
    for change in sorted(changes, key=lambda c: order.index(c.verdict)):
        before, after = change.before, change.after
        peaks = [row.peak_bytes for row in (before, after) if row is not None and row.peak_bytes]
        interval = ("{:.3f} to {:.3f}".format(*change.interval) if change.interval
                    else change.reason)
        lines.append((
            change.verdict, "" if change.ratio is None else f"{change.ratio:.3f}", interval,
            *("" if row is None or row.median_s is None else time_text(row.median_s)
              for row in (before, after)),
            f"{peaks[1] / peaks[0]:.2f}" if len(peaks) == 2 else "", change.provider, change.name))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines]
    counts = ", ".join(f"{sum(c.verdict == verdict for c in changes)} {verdict}"
                       for verdict in order)
    return "\n".join([*text, f"{len(changes)} rows: {counts}"])
