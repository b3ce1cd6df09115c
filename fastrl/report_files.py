"""Reads what stages wrote, for the report: every file may be missing, or stop in mid-line."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastrl.report_svg import Series


@dataclass(frozen=True, slots=True)
class StageFiles:
    """What one stage left behind."""

    name: str
    kind: str
    run: Mapping[str, Any]
    config_text: str
    metrics: Mapping[str, Series]
    """Metric name -> its values against the step; metrics.jsonl and timing.jsonl."""
    samples: tuple[Mapping[str, Any], ...]
    reward_report: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    best_of_n: Mapping[str, Any]
    watch: tuple[Mapping[str, Any], ...]
    """Evaluations as the reward-hacking watch saw them."""
    alarms: tuple[Mapping[str, Any], ...]
    """Steps at which an alarm began."""
    finished: Mapping[str, Any]


def read_stages(run_dir: Path) -> list[StageFiles]:
    """Return the stages of a recipe's run folder in the order they ran, or the folder's own stage.

    Folders that a pipeline has set aside (`ppo.old-1`) are left out.
    """
    if (run_dir / "run.json").exists():
        return [_read_stage(run_dir)]
    folders = [path.parent for path in run_dir.glob("*/run.json") if "." not in path.parent.name]
    stages = [_read_stage(folder) for folder in folders]
    return sorted(stages, key=lambda stage: (str(stage.run.get("started_at", "")), stage.name))


def _read_stage(folder: Path) -> StageFiles:
    run = read_json(folder / "run.json")
    lineage = run.get("lineage") or {}
    rows = [*_read_lines(folder / "metrics.jsonl"), *_read_lines(folder / "timing.jsonl")]
    config = folder / "config.yaml"
    return StageFiles(
        name=folder.name,
        kind=str(lineage.get("kind") or run.get("stage") or folder.name),
        run=run,
        config_text=config.read_text(encoding="utf-8") if config.exists() else "",
        metrics=_series(folder.name, rows),
        samples=tuple(_read_lines(folder / "samples.jsonl")),
        reward_report=read_json(folder / "reward_report.json"),
        evaluation=read_json(folder / "evaluation.json"),
        best_of_n=read_json(folder / "best_of_n.json"),
        watch=tuple(_read_lines(folder / "watch.jsonl")),
        alarms=tuple(_read_lines(folder / "alarms.jsonl")),
        finished=read_json(folder / "finished.json"),
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Return the mapping in a JSON file; nothing where there is no such file."""
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows of a JSON-lines file, without a last line that a stopped run left unfinished."""
    if not path.exists():
        return
    # Not splitlines: samples may hold U+2028 and other characters it takes for line ends.
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        yield json.loads(line)


def _series(name: str, rows: list[Mapping[str, Any]]) -> dict[str, Series]:
    """Finite values of every metric against the step; null stands for NaN and is left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for metric, value in row.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if metric != "step" and is_number and "step" in row:
                points.setdefault(metric, []).append((float(row["step"]), float(value)))
    return {metric: Series(name, tuple(x for x, _ in pairs), tuple(y for _, y in pairs))
            for metric, pairs in points.items()}
