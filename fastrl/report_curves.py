"""The report's figures of training: curves of every metric, reward against KL, reward models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastrl.errors import ConfigError
from fastrl.glossary import explain
from fastrl.report_best_of_n import best_of_n_line, best_of_n_table
from fastrl.report_files import StageFiles
from fastrl.report_html import details, figure, table, text
from fastrl.report_svg import Series, format_number, legend, line_plot, sparkline

HEADLINES = ("reward/score_mean", "kl/policy_ref", "entropy/mean", "response/length_mean",
             "value/explained_variance", "ratio/first_minibatch_mean", "loss/policy", "loss/value",
             "loss/train", "loss/eval", "loss/ptx", "loss/ranking", "loss/ranking_eval",
             "reward/accuracy", "reward/accuracy_eval", "eval/objective")
"""Metrics that are drawn large, in this order; the others are in a folded table."""


def curves(kind: str, stages: Sequence[StageFiles], max_points: int) -> list[str]:
    """Return HTML of the metrics of all stages of one kind: the important ones large, all listed.

    Stages of one kind share their plots, so that PPO and PPO-ptx are seen against each other.

    Args:
        kind: Stage kind.
        stages: All stages of the run.
        max_points: Longer lines are thinned out to this many points.
    """
    stages = [stage for stage in stages if stage.kind == kind]
    names = sorted({metric for stage in stages for metric in stage.metrics})
    lines = {metric: [replace(stage.metrics[metric], style=style)
                      for style, stage in enumerate(stages) if metric in stage.metrics]
             for metric in names}
    plots = [_plot(metric, lines[metric], f"{kind}-{index}", max_points)
             for index, metric in enumerate(HEADLINES)
             if any(len(line.xs) > 1 for line in lines.get(metric, ()))]
    if "kl/policy_ref" in lines and "reward/score_mean" in lines:
        baselines = [best_of_n_line(stage, style=len(stages) + index)
                     for index, stage in enumerate(stages) if stage.best_of_n]
        plots.append(_frontier(lines["reward/score_mean"], lines["kl/policy_ref"], baselines,
                               f"{kind}-frontier"))
    rows = [(metric, sparkline(line.ys, max(4, max_points // 4)), line.name, line.ys[0],
             line.ys[-1], "" if index else _meaning(metric))
            for metric in names for index, line in enumerate(lines[metric])]
    everything = table(("metric", "course", "stage", "first", "last", "meaning"), rows,
                       caption="Every metric, first and last value", raw_columns=(1,))
    return [f'<div class="plots">{"".join(plots)}</div>' if plots else "",
            *(best_of_n_table(stage) for stage in stages),
            *(_reward_model(stage) for stage in stages),
            details(f"All {len(names)} metrics", everything)]


def _meaning(metric: str) -> str:
    try:
        return explain(metric).meaning
    except ConfigError:  # of a run of another version
        return ""


def _plot(metric: str, lines: Sequence[Series], label_id: str, max_points: int) -> str:
    """One metric with its last value, legend and sentence."""
    last = ", ".join(format_number(line.ys[-1]) for line in lines)
    plot = line_plot(metric, lines, "step", label_id=label_id, max_points=max_points)
    return figure(metric, f"last {last}", plot + legend(lines), _meaning(metric))


def _frontier(rewards: Sequence[Series], distances: Sequence[Series],
              baselines: Sequence[Series], label_id: str) -> str:
    """Reward over the distance from the reference: the exchange rate of each run."""
    lines = []
    for reward in rewards:
        score = dict(zip(reward.xs, reward.ys, strict=True))
        pairs = [(math.sqrt(max(kl, 0.0)), score[step])
                 for distance in distances if distance.style == reward.style
                 for step, kl in zip(distance.xs, distance.ys, strict=True) if step in score]
        if pairs:
            lines.append(replace(reward, xs=tuple(x for x, _ in pairs),
                                 ys=tuple(y for _, y in pairs)))
    if not lines:
        return ""
    lines += baselines
    title = "reward against sqrt(KL)"
    plot = line_plot(title, lines, "sqrt(KL), KL in nats per response", label_id=label_id)
    return figure(title, "", plot + legend(lines),
                  "Reward gained for distance travelled from the reference; in the literature "
                  "close to a straight line until over-optimisation bends it down.")


def _reward_model(stage: StageFiles) -> str:
    """Accuracy tables and calibration of a reward model, where the stage wrote a report."""
    report = stage.reward_report
    if not report:
        return ""
    rows = [_accuracy_row("all", report["overall"])]
    for title, key in (("source", "by_source"), ("K", "by_completions"),
                       ("score difference", "by_margin")):
        if len(report[key]) > 1:
            rows += [_accuracy_row(f"{title} {name}", row) for name, row in report[key].items()]
    accuracy = table(("held-out pairs", "pairs", "accuracy", "95% interval", "length alone",
                      "its rule"), rows, caption="Share ranked as people ranked them; chance is "
                     "0.5. Length alone prefers the longer, or the shorter, completion.")
    bins = [entry for entry in report.get("calibration", ()) if entry["num_pairs"]]
    if not bins:
        return f"<h3>{text(stage.name)}</h3>" + accuracy
    line = Series("observed", tuple(entry["predicted"] for entry in bins),
                  tuple(entry["observed"] for entry in bins))
    svg = line_plot("calibration", [line], "predicted share of wins",
                    label_id=f"{text(stage.name)}-calibration", diagonal=True)
    plot = figure("calibration", f"error {format_number(report['calibration_error'])}", svg,
                  "Share of pairs won by the higher score, against the share the model predicted; "
                  "on the dashed line it means what it says.")
    return f'<h3>{text(stage.name)}</h3>{accuracy}<div class="plots">{plot}</div>'


def _accuracy_row(name: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (name, row["num_pairs"], row["accuracy"], f"{row['low']:.3f} to {row['high']:.3f}",
            row["length_accuracy"], row["length_rule"])
