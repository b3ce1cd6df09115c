"""The report's section on alarms: what went wrong, when first, and for how many steps."""

from collections.abc import Mapping
from typing import Any

from fastrl.report_files import StageFiles
from fastrl.report_html import table, text


def alarms(stage: StageFiles) -> str:
    """Return HTML of the alarms of a stage; nothing where there was none."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in stage.alarms:
        first.setdefault(row["alarm"], row)
    rows = [(name.replace("_", " "), row["step"], _num_steps(stage, name), row["reason"],
             row["advice"]) for name, row in first.items()]
    columns = ("alarm", "first at step", "steps", "reason, when it began", "what to do")
    return f"<h3>{text(stage.name)}</h3>" + table(columns, rows) if rows else ""


def _num_steps(stage: StageFiles, name: str) -> float | None:
    """Steps with an alarm, None where the run ended before it wrote them."""
    line = stage.metrics.get(f"alarm/{name}")
    return None if line is None else line.ys[-1]
