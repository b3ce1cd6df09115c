"""`python -m benchmarks pairs --base REVISION PART...`: one part in two trees, in turns.

The sources of a revision are checked out beside this tree; the part runs in a process of each, one
after the other, beginning with the other one in each turn. A sample is what one process found, its
median: where a process lies in memory is part of the noise. Two result files with the same `turns`
come out, which `compare` reads pair by pair.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare import Key, key_of
from benchmarks.results import ROOT, Row, load, save
from benchmarks.timing import Timing

Run = tuple[dict[str, Any], list[Row]]


def run_part(tree: Path, part: Sequence[str]) -> Run:
    """The result file that a part of a tree's benchmarks writes.

    Raises:
        SystemExit: when it fails; with the end of what it printed.
    """
    path = f"{tree}{os.pathsep}{tree / 'kernels'}"
    if os.environ.get("PYTHONPATH"):
        path += os.pathsep + os.environ["PYTHONPATH"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", *part, "--out", folder], cwd=tree, text=True,
            capture_output=True, env={**os.environ, "PYTHONPATH": path})
        files = list(Path(folder).glob("*.json"))
        if done.returncode or len(files) != 1:
            raise SystemExit(f"{' '.join(part)} in {tree}: exit status {done.returncode}, "
                             f"{len(files)} result files\n{(done.stdout + done.stderr)[-2000:]}")
        return load(files[0])


def merged(runs: Sequence[Run], turns: str) -> Run:
    """One file of many: the samples of a row are the medians of the runs.

    Args:
        turns: Tells which files' samples belong together.
    """
    document, rows = runs[0]
    by_run = [{key_of(row): row for row in rows} for _, rows in runs]
    return document, [_merged_row(key_of(row), by_run, turns) for row in rows]


def _merged_row(key: Key, by_run: Sequence[dict[Key, Row]], turns: str) -> Row:
    """A row without a figure where one run has none."""
    rows = [found[key] for found in by_run if key in found]
    medians = [row.median_s for row in rows if row.median_s is not None]
    if len(medians) < len(by_run):
        without = [row for row in rows if row.median_s is None]
        return without[0] if without else rows[0].without_figure("error", "not in every turn")
    peaks = [row.peak_bytes for row in rows if row.peak_bytes is not None]
    row = rows[0].timed(Timing(rows[0].timer, medians), max(peaks, default=None), None, None)
    return replace(row, extra={**row.extra, "turns": turns})


def run_pairs(base: str, part: Sequence[str], num_turns: int, out: Path) -> tuple[Path, Path]:
    """Run `part` in turns in the revision `base` and in this tree; the two files, base first."""
    turns = f"{base} {datetime.now(UTC).isoformat(timespec='seconds')}"
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "base"
        _git("worktree", "add", "--detach", str(tree), base)
        try:
            runs: dict[Path, list[Run]] = {tree: [], ROOT: []}
            for turn in range(num_turns):
                for where in ((tree, ROOT), (ROOT, tree))[turn % 2]:
                    runs[where].append(run_part(where, part))
                print(f"turn {turn + 1} of {num_turns}", flush=True)
        finally:
            _git("worktree", "remove", "--force", str(tree))
    paths = []
    for name, done in (("base", runs[tree]), ("here", runs[ROOT])):
        document, rows = merged(done, turns)
        path = out / f"{document['topic']}_pairs_{datetime.now(UTC):%Y%m%d}_{name}.json"
        save(document, rows, path)
        paths.append(path)
    return paths[0], paths[1]


def _git(*arguments: str) -> None:
    """Run git in this repository.

    Raises:
        SystemExit: when it fails, with what it said.
    """
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
