"""`report.html`: what a run did, in one file that opens anywhere, offline, without scripts."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import fastrl
from fastrl.console import format_seconds
from fastrl.errors import ConfigError
from fastrl.metrics import write_atomic
from fastrl.report_alarms import alarms
from fastrl.report_comparison import comparison, evaluations_of_seeds
from fastrl.report_curves import curves
from fastrl.report_files import StageFiles, read_json, read_stages
from fastrl.report_html import card, details, figure, page, paragraph, section, table, text
from fastrl.report_svg import Interval, interval_plot
from fastrl.report_watch import watch

KIND_TITLES = {"pretrain": "Pretraining", "sft": "Supervised fine-tuning",
               "reward": "Reward model", "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "dpo": "DPO",
               "best_of_n": "Best of n"}
"""Kinds whose metrics are plotted, in the order of the page."""

MAX_BYTES = 1_000_000
"""Larger pages are made again with fewer points, shorter samples and fewer of them."""

_MAX_POINTS, _MAX_SAMPLE_ROWS, _MAX_SAMPLE_CHARACTERS = 240, 24, 1500
_COMMAND_KINDS = ("sft", "reward", "ppo", "grpo", "rloo", "dpo", "best_of_n")


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the folder of a recipe's run or of one stage, and return its path.

    The page is one file of at most 1 MB without any external request. What a stage did not write is
    left out.

    Args:
        run_dir: A folder with `run.json`, or one whose subfolders have it.
    Raises:
        ConfigError: when there is no run in the folder.
    """
    stages = read_stages(run_dir)
    if not stages:
        raise ConfigError(f"{run_dir}: expected a run folder (run.json in it or in its "
                          "subfolders), found none; check the path")
    name = str(read_json(run_dir / "recipe.json").get("name") or run_dir.resolve().name)
    for thinning in (1, 2, 4, 8, 16, 32):
        html = page(f"{name}: fastrl report", _body(name, stages, thinning))
        if len(html.encode()) <= MAX_BYTES:
            break
    path = run_dir / "report.html"
    write_atomic(path, html)
    return path


def _body(name: str, stages: Sequence[StageFiles], thinning: int) -> Iterator[str]:
    """The parts of the page, in reading order."""
    sections = [
        section("results", "Results", _results(stages)),
        section("samples", "Samples", _samples(stages, thinning)),
        *(section(f"kind-{kind}", title, curves(kind, stages, _MAX_POINTS // thinning))
          for kind, title in KIND_TITLES.items()),
        section("alarms", "Alarms", [alarms(stage) for stage in stages]),
        section("watch", "Reward-hacking watch", [watch(stage) for stage in stages]),
        section("stages", "Stages", [_stage_table(stages), *map(_summary, stages)]),
        section("reproduce", "Reproduce", _reproduce(name, stages)),
    ]
    seconds = sum(float(stage.finished.get("seconds", 0)) for stage in stages)
    count = "1 stage" if len(stages) == 1 else f"{len(stages)} stages"
    yield (f'<header><h1>{text(name)}</h1><p class="soft">{count}, '
           f"{format_seconds(seconds)}, fastrl {text(fastrl.__version__)}</p></header>")
    links = (f'<a href="#{anchor}">{title}</a>' for anchor, title in _headings(sections))
    yield f'<nav aria-label="sections">{"".join(links)}</nav>'
    yield from sections


def _headings(sections: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Anchor and title of each section that is not empty."""
    for html in filter(None, sections):
        _, _, rest = html.partition('<h2 id="')
        anchor, _, rest = rest.partition('">')
        yield anchor, rest.partition("</h2>")[0]


def _stage_table(stages: Sequence[StageFiles]) -> str:
    """Time, memory and state of each stage."""
    rows = [(stage.name, stage.kind,
             format_seconds(stage.finished["seconds"]) if stage.finished else "not finished",
             _last(stage, "throughput/tokens_per_s"),
             stage.finished.get("peak_memory_gib"), str(stage.run.get("started_at", "")))
            for stage in stages]
    return table(("stage", "kind", "time", "tokens/s at the end", "peak GiB", "started (UTC)"),
                 rows, caption="What ran, and what it took")


def _summary(stage: StageFiles) -> str:
    """What the stage itself says about its result, unless the page shows it already."""
    summary = stage.finished.get("summary") or {}
    rows = [] if stage.evaluation else list(_leaves(summary))
    return details(f"{stage.name}: summary", table(("name", "value"), rows))


def _leaves(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(dotted name, value) of the leaves of nested mappings; lists are written out."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _leaves(item, f"{prefix}{key}.")
        else:
            yield prefix + key, str(item) if isinstance(item, list) else item


def _last(stage: StageFiles, metric: str) -> float | None:
    line = stage.metrics.get(metric)
    return None if line is None else line.ys[-1]


def _reproduce(name: str, stages: Sequence[StageFiles]) -> list[str]:
    """Commands, settings, lineage and versions."""
    parts = []
    if len(stages) > 1:
        command = f"fastrl run {shlex.quote(name)}.yaml --data_root DATA --output_dir NEW-FOLDER"
        parts.append(f"<pre>{text(command)}</pre>")
    for stage in stages:
        lines = []
        if stage.kind in _COMMAND_KINDS:
            lines.append(f"<pre>{text(_stage_command(stage))}</pre>")
        inputs: Mapping[str, Any] = (stage.run.get("lineage") or {}).get("inputs") or {}
        lines.append(table(("input", "SHA-256"), list(inputs.items()),
                           caption="What it was made from"))
        versions: Mapping[str, Any] = stage.run.get("versions") or {}
        lines.append(paragraph(", ".join(f"{package} {version}" for package, version
                                         in versions.items() if version)))
        lines.append(f"<pre>{text(stage.config_text)}</pre>" if stage.config_text else "")
        parts.append(details(f"{stage.name}: settings, inputs, versions", "".join(lines)))
    return parts


def _stage_command(stage: StageFiles) -> str:
    return (f"fastrl {stage.kind} --config {shlex.quote(stage.name)}/config.yaml "
            "--output_dir NEW-FOLDER")


def _results(stages: Sequence[StageFiles]) -> list[str]:
    """Win rates with intervals, and what each model costs and gains; seeds together first."""
    groups = evaluations_of_seeds(stages)
    pooled = [stage for group in groups for stage in group]
    single = [stage for stage in stages if stage.evaluation and stage not in pooled]
    return [*(comparison(group, stages) for group in groups), *_evaluations(single),
            details("Each seed alone", "".join(_evaluations(pooled)))]


def _evaluations(stages: Sequence[StageFiles]) -> list[str]:
    """Cards, a plot and a table for each evaluation."""
    parts = []
    for stage in stages:
        result = stage.evaluation
        wins = [Interval(f"{win['model']} over {win['opponent']}", win["rate"], win["low"],
                         win["high"]) for win in result["win_rates"]]
        cards = [card(f"{win.rate:.1%}", win.name, f"95% interval {win.low:.1%} to {win.high:.1%}")
                 for win in wins]
        sentence = (f"Share of {result['num_prompts']} held-out prompts on which the first model's "
                    f"answer is better, judged by: {result['judge']}. Ties count one half; an "
                    "interval that stays off the middle line is a real difference.")
        plot = interval_plot("win rates", wins, label_id=f"{text(stage.name)}-wins")
        parts += [f'<div class="cards">{"".join(cards)}</div>',
                  f'<div class="plots">{figure("win rates", "", plot, sentence)}</div>',
                  _model_table(result)]
    return parts


def _model_table(result: Mapping[str, Any]) -> str:
    """One row per model; a column is left out where no model has it."""
    columns = (("score_mean", "score"), ("reward_mean", "reward"), ("kl", "KL, nats"),
               ("loglikelihood", "log-likelihood/token"), ("lm_loss", "text loss"),
               ("distinct_word_ratio", "distinct words"), ("response_length", "tokens"),
               ("eos_rate", "stopped"))
    models: Mapping[str, Mapping[str, Any]] = result["models"]
    present = [(key, title) for key, title in columns
               if any(key in facts for facts in models.values())]
    rows = [(name, *(facts[key]["k1"] if key == "kl" else facts.get(key) for key, _ in present))
            for name, facts in models.items()]
    caption = (f"KL and log-likelihood of each model's own samples under {result['reference']}; "
               "text loss is the mean loss on held-out text, which rises when a model forgets")
    return table(("model", *(title for _, title in present)), rows, caption=caption)


def _samples(stages: Sequence[StageFiles], thinning: int) -> list[str]:
    """Answers of all models to the same prompts; where none were compared, first and last ones."""
    tables = []
    limit = _MAX_SAMPLE_CHARACTERS // thinning
    for stage in stages:
        rows = [(sample["prompt"], sample["responses"])
                for sample in stage.evaluation.get("samples", ())]
        rows = rows or _before_and_after(stage.samples)
        if rows:
            names = list(rows[0][1])
            cells = [(_cut(prompt, limit), *(_cut(responses[name], limit) for name in names))
                     for prompt, responses in rows[:max(1, _MAX_SAMPLE_ROWS // thinning)]]
            tables.append((bool(stage.evaluation), f"<h3>{text(stage.name)}</h3>"
                           + table(("prompt", *names), cells)))
    compared = [html for is_compared, html in tables if is_compared]
    others = [html for is_compared, html in tables if not is_compared]
    shown = compared or others
    folded = details("Samples of single stages", "".join(others)) if compared else ""
    return [f'<div class="samples">{"".join(shown)}{folded}</div>'] if shown else []


def _before_and_after(samples: Sequence[Mapping[str, Any]]
                      ) -> list[tuple[str, dict[str, str]]]:
    """(prompt, step -> response) of prompts that were sampled more than once, or of all."""
    by_prompt: dict[str, list[tuple[int, str]]] = {}
    for sample in samples:
        if "prompt" in sample and "response" in sample:
            entry = (int(sample.get("step", 0)), str(sample["response"]))
            by_prompt.setdefault(str(sample["prompt"]), []).append(entry)
    steps = sorted({step for entries in by_prompt.values() for step, _ in entries})
    shown = dict.fromkeys((*steps[:1], *steps[-1:]))
    rows = [(prompt, {f"step {step}": dict(reversed(entries)).get(step, "") for step in shown})
            for prompt, entries in by_prompt.items()]
    return [row for row in rows if any(row[1].values())]


def _cut(sample: str, limit: int) -> str:
    """A sample short enough for a table."""
    return sample if len(sample) <= limit else f"{sample[:limit]} ... ({len(sample):,} characters)"
