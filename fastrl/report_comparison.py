"""The report's comparison of policies over seeds: win rates against KL, and what each cost."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastrl.pooling import PooledWins, pool_evaluations
from fastrl.report_files import StageFiles
from fastrl.report_html import figure, table, text
from fastrl.report_svg import Interval, Mark, format_number, scatter_plot

ROLLOUT_KINDS = ("ppo", "grpo", "rloo", "best_of_n")
"""Kinds whose generated tokens train a policy; those of `rank` are labelled first."""


def evaluations_of_seeds(stages: Sequence[StageFiles]) -> list[list[StageFiles]]:
    """Return the evaluations that compare the same pairs of models, two or more of them."""
    groups: dict[Any, list[StageFiles]] = {}
    for stage in stages:
        if stage.evaluation:
            result = stage.evaluation
            pairs = tuple((win["model"], win["opponent"]) for win in result["win_rates"])
            groups.setdefault((result["reference"], result["judge"], pairs), []).append(stage)
    return [group for group in groups.values() if len(group) > 1]


def comparison(group: Sequence[StageFiles], stages: Sequence[StageFiles]) -> str:
    """Return HTML of one table and one plot of what the evaluations of all seeds say together.

    Args:
        group: See `evaluations_of_seeds`.
        stages: All stages of the run, for what they generated.
    """
    first = group[0].evaluation
    pooled = pool_evaluations([stage.evaluation for stage in group])
    reference, count = first["reference"], len(group)
    title = f"win rate over {reference} against KL"
    plot = scatter_plot(title, list(_marks(pooled, reference)),
                        f"KL from {reference}, nats per response",
                        label_id=f"{text(group[0].name)}-pooled", base=0.5)
    sentence = (f"Means of {count} seeds, each with its own data, models and "
                f"{first['num_prompts']} held-out prompts, judged by: {first['judge']}. Small dots "
                "are the seeds. Higher is better; further left is nearer to where all began.")
    return (f'<h3>{count} seeds together</h3><div class="plots">'
            + figure(title, "", plot, sentence, is_wide=True) + "</div>"
            + _table(pooled, group, stages))


def _marks(pooled: Sequence[PooledWins], reference: str) -> Iterator[Mark]:
    for wins in pooled:
        if wins.opponent == reference:
            rate, kl = wins.rate, wins.kl
            yield Mark(wins.model, Interval("KL", kl.mean, kl.low, kl.high),
                       Interval("rate", rate.mean, rate.low, rate.high),
                       tuple(zip(kl.by_seed, rate.by_seed, strict=True)))


def _table(pooled: Sequence[PooledWins], group: Sequence[StageFiles],
           stages: Sequence[StageFiles]) -> str:
    """One row per pair, with the tokens that were generated for it, means over seeds."""
    best = group[0].evaluation.get("best_of_n") or {}
    columns = ["model", "over", "win rate", "95% interval", "by seed", "KL, nats", "by seed",
               "score", "text loss", "tokens for labels", "tokens to train", "tokens per answer"]
    rows = []
    for wins in pooled:
        spent = [generated_tokens(wins.model, stage, stages) for stage in group]
        labels, training = (round(sum(values) / len(spent)) for values in zip(*spent, strict=True))
        draws = best["n"] if wins.model == best.get("name") else 1
        rows.append((wins.model, wins.opponent, wins.rate.mean,
                     f"{wins.rate.low:.3f} to {wins.rate.high:.3f}",
                     ", ".join(f"{rate:.3f}" for rate in wins.rate.by_seed), wins.kl.mean,
                     ", ".join(map(format_number, wins.kl.by_seed)), wins.facts.get("score_mean"),
                     wins.facts.get("lm_loss"), f"{labels:,}", f"{training:,}",
                     draws * wins.facts["response_length"]))
    bound = (f" KL of {best['name']} is at most {format_number(best['kl_bound'])} by the formula; "
             "the table has what was measured." if best else "")
    return table(columns, rows, caption=(
        "Intervals are over seeds and prompts: Student's of the seeds' rates, and never narrower "
        "than Wilson's of all prompts. Tokens are those that models generated: answers that were "
        f"labelled, answers that a policy learned from, and what one answer costs in use.{bound}"))


def generated_tokens(model: str, evaluation: StageFiles, stages: Sequence[StageFiles]
                     ) -> tuple[int, int]:
    """What was generated for one model of an evaluation: (tokens of labelled answers, of others).

    Every stage counts that the model was made from, once: its own, those of its data, of the reward
    model it was trained or chosen with.
    """
    by_name = {stage.name: stage for stage in stages}
    config = _config(evaluation)
    best = (evaluation.evaluation.get("best_of_n") or {}).get("name")
    begin = [config.get("reward_model")] if model == best else [config["models"][model]]
    waiting, seen = list(_stage_names(begin)), set[str]()
    labels = training = 0
    while waiting:
        name = waiting.pop()
        if name in seen or name not in by_name:
            continue
        seen.add(name)
        stage = by_name[name]
        waiting += _stage_names((stage.run.get("lineage") or {}).get("inputs") or ())
        if stage.kind == "rank":
            labels += _labelled_tokens(stage)
        elif stage.kind in ROLLOUT_KINDS:
            training += _rollout_tokens(stage)
    return labels, training


def _config(stage: StageFiles) -> Mapping[str, Any]:
    """The settings of a stage, paths as the recipe names them."""
    config: Mapping[str, Any] = (stage.run.get("lineage") or {}).get("config") or {}
    return config


def _stage_names(references: Any) -> Iterator[str]:
    for reference in references:
        if isinstance(reference, str) and reference.startswith("@"):
            yield reference[1:].partition("/")[0]


def _labelled_tokens(stage: StageFiles) -> int:
    """Tokens of the training rankings."""
    labels = stage.finished.get("summary") or {}
    part = labels.get("rankings") or {}
    return int(part.get("num_prompts", 0) * labels.get("num_samples_per_prompt", 0)
               * part.get("response_length", 0.0) + 0.5)


def _rollout_tokens(stage: StageFiles) -> int:
    """Tokens of all rollouts; lines may be of some iterations only."""
    summary = stage.finished.get("summary") or {}
    if "generated_tokens" in summary:
        return int(summary["generated_tokens"])
    lengths = stage.metrics.get("response/length_mean")
    if lengths is None:
        return 0
    responses = summary.get("iterations", len(lengths.ys)) * _config(stage)["rollout_batch_size"]
    return int(sum(lengths.ys) / len(lengths.ys) * responses + 0.5)
