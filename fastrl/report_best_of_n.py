"""Best-of-n in the report: a table, and a line beside those of training."""

import math

from fastrl.report_files import StageFiles
from fastrl.report_html import table, text
from fastrl.report_svg import Series


def best_of_n_table(stage: StageFiles) -> str:
    """Return HTML of what best-of-n gains at which KL; nothing where it was not measured."""
    result = stage.best_of_n
    if not result:
        return ""
    rows = [(row["n"], row["score_mean"], row.get("gold_mean"), row["kl_bound"], row["kl"])
            for row in result["table"]]
    columns = ["n", "mean score", "mean gold score", "KL at most", "KL measured"]
    if all(row[2] is None for row in rows):
        columns.pop(2)
        rows = [(*row[:2], *row[3:]) for row in rows]  # type: ignore[misc]
    caption = (f"The best of n samples of the model that {stage.name} starts from, by the score, "
               f"over {result['num_prompts']} prompts with {result['num_samples_per_prompt']} "
               "samples each. KL in nats from that model: at most log n - (n-1)/n, measured where "
               "scores tie. A trained policy is worth its training where it scores higher at the "
               "same KL.")
    return f"<h3>{text(stage.name)}: best of n</h3>" + table(columns, rows, caption=caption)


def best_of_n_line(stage: StageFiles, style: int) -> Series:
    """Return score against sqrt(measured KL) over n, in the order of n."""
    rows = stage.best_of_n["table"]
    return Series(f"{stage.name}: best of n", tuple(math.sqrt(row["kl"]) for row in rows),
                  tuple(row["score_mean"] for row in rows), style)
