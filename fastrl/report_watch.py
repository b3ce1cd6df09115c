"""The report's section on reward hacking: alarms, signs, and gold against proxy over sqrt(KL)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastrl.overoptimization import Fit, Form, fit_gain
from fastrl.report_files import StageFiles
from fastrl.report_html import figure, paragraph, table, text
from fastrl.report_svg import Series, format_number, legend, line_plot

SIGNS = {"proxy": "optimised score", "gold": "gold score", "length": "tokens of a response",
         "entropy": "entropy, nats per token", "repetition": "repeated 4-grams",
         "distinct_1": "distinct tokens", "distinct_2": "distinct 2-grams",
         "kl": "KL(policy || reference)", "kl_start_policy": "KL(start || policy)"}
"""Values of a row of watch.jsonl, in the order of the page."""

_CURVE_POINTS = 40


def watch(stage: StageFiles) -> str:
    """Return HTML of what the watch of a stage saw; nothing where there was none."""
    rows = stage.watch
    if not rows:
        return ""
    signs = [(title, rows[0][sign], max(row[sign] for row in rows if sign in row),
              min(row[sign] for row in rows if sign in row), rows[-1][sign])
             for sign, title in SIGNS.items() if sign in rows[0] and sign in rows[-1]]
    parts = [f"<h3>{text(stage.name)}</h3>", _alarms(rows),
             table(("held-out prompts", "first", "highest", "lowest", "last"), signs),
             _gains(stage, rows)]
    return "".join(parts)


def _alarms(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each alarm once: when it began, and when it was last there."""
    seen: dict[str, list[Any]] = {}
    for row in rows:
        for sign, reason in row["alarms"].items():
            entry = seen.setdefault(sign, [sign.replace("_", " "), row["step"], None, reason])
            entry[2] = row["step"]
    if not seen:
        return paragraph(f"No alarm in {len(rows)} evaluations.")
    return table(("alarm", "from iteration", "until", "reason, when it began"), list(seen.values()))


def _gains(stage: StageFiles, rows: Sequence[Mapping[str, Any]]) -> str:
    """Gains of proxy and gold over sqrt(KL), their fits and those of best-of-n."""
    rows = [row for row in rows if "kl" in row]
    if len(rows) < 2:
        return ""
    distances = [math.sqrt(max(0.0, row["kl"])) for row in rows]
    names = [name for name in ("proxy", "gold") if name in rows[0]]
    gains = {name: [row[name] - rows[0][name] for row in rows] for name in names}
    lines = [Series(SIGNS[name], tuple(distances), tuple(gains[name]), style)
             for style, name in enumerate(names)]
    fits = [(SIGNS[name], fit_gain("rl", distances, gains[name])) for name in names]
    lines += [_curve(f"fit: {name}", fit, max(distances), len(names) + index)
              for index, (name, fit) in enumerate(fits) if fit is not None]
    title = "gain against sqrt(KL)"
    plot = line_plot(title, lines, "sqrt(KL), KL in nats per response",
                     label_id=f"{text(stage.name)}-gains")
    sentence = ("Gain over the first evaluation. Where the gold score bends down while the "
                "optimised one rises, more of the same training makes the model worse.")
    return (f'<div class="plots">{figure(title, "", plot + legend(lines), sentence)}</div>'
            + _fit_table([*fits, *_best_of_n_fits(stage)]))


def _best_of_n_fits(stage: StageFiles) -> list[tuple[str, Fit | None]]:
    """The fits of the baseline that the stage measured before it trained."""
    rows, fits = stage.best_of_n.get("table", ()), []
    for key, sign in (("score_mean", "proxy"), ("gold_mean", "gold")):
        if rows and key in rows[0]:
            fits.append((f"{SIGNS[sign]}, best of n", fit_gain(
                "best_of_n", [math.sqrt(row["kl"]) for row in rows],
                [row[key] - rows[0][key] for row in rows])))
    return fits


def _curve(name: str, fit: Fit, farthest: float, style: int) -> Series:
    """A fit as a line from 0 to the farthest point."""
    xs = tuple(farthest * i / _CURVE_POINTS for i in range(_CURVE_POINTS + 1))
    return Series(name, xs, tuple(fit(x) for x in xs), style)


def _fit_table(fits: Sequence[tuple[str, Fit | None]]) -> str:
    formulas: dict[Form, str] = {"best_of_n": "d (a - b d)", "rl": "d (a - b log d)"}
    rows = []
    for name, fit in fits:
        if fit is not None:
            distance, gain = map(format_number, fit.peak) if fit.peak else ("none", "")
            rows.append((name, formulas[fit.form], fit.a, fit.b, fit.rms_error, distance, gain))
    columns = ("gain of", "fit, d = sqrt(KL)", "a", "b", "error (rms)", "peak at d", "gain there")
    return table(columns, rows,
                 caption="Fits of Gao et al. 2022; a peak far beyond the points is a guess.")
