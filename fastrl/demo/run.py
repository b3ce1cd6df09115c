"""Run the demo: write the world's files, run the recipe on them, say what came out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastrl.console import Console
from fastrl.errors import ConfigError
from fastrl.metrics import write_atomic
from fastrl.pipeline import run_recipe
from fastrl.recipe import load_recipe
from fastrl.world_files import write_world

RECIPE = Path(__file__).with_name("recipe.yaml")


def run_demo(
    output_dir: Path | str, *, seed: int = 0, overrides: Sequence[str] = (), console: Console
) -> dict[str, Any]:
    """Make the world, run the pipeline in it, and show the result.

    Args:
        output_dir: `world/` in it gets the data, `run/` the stages and the report. A second call
            continues where the first one stopped.
        seed: Seeds the world's files, the models and the samples.
        overrides: `stage.field=value`, applied to the demo's recipe.
        console: Where everything is shown; the last line is the summary as JSON.
    Returns:
        The summary.
    Raises:
        ConfigError: when `output_dir` holds something else, or a demo with another seed.
    """
    output_dir = Path(output_dir)
    _claim(output_dir, seed)
    console.print("fastrl demo: people ask about animals; a labeler wants right facts and "
                  "politeness. A model learns to speak (base), to answer (SFT), and to please "
                  "the labeler (PPO, PPO-ptx).")
    write_world(output_dir / "world", seed)
    report = run_recipe(RECIPE, data_root=output_dir / "world", output_dir=output_dir / "run",
                        overrides=[f"seed={seed}", *overrides], console=console)
    summary = summarize(output_dir / "run", seed)
    console.explain(["kl/policy_ref", "reward/score_mean", "value/explained_variance"])
    console.print(f"report   {report}")
    console.print(f"talk     fastrl chat --model_name_or_path {output_dir}/run/ppo_ptx/model")
    console.result(json.dumps(summary))
    return summary


def _claim(output_dir: Path, seed: int) -> None:
    """Note the seed in a new or empty folder; ConfigError where something else is there."""
    record = output_dir / "demo.json"
    if record.exists():
        held = _read(record)["seed"]
        if held != seed:
            raise ConfigError(f"output_dir: {output_dir} holds a demo with seed {held}, expected "
                              f"{seed}; choose another output_dir")
    elif output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ConfigError(f"output_dir: expected a new or empty folder, or one of an earlier demo, "
                          f"got {output_dir}; choose another output_dir")
    else:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps({"seed": seed}) + "\n")


def summarize(run: Path, seed: int) -> dict[str, Any]:
    """The figures of a finished demo, read from the files of its stages."""
    evaluation = _read(run / "evaluation/evaluation.json")
    reward = _read(run / "reward/reward_report.json")
    labels = _read(run / "rank/labels.json")
    models = evaluation["models"]
    seconds = {stage.name: round(_read(run / stage.name / "finished.json")["seconds"], 1)
               for stage in load_recipe(RECIPE).stages}
    return {
        "seed": seed,
        "num_prompts": evaluation["num_prompts"],
        "win_rates": {
            f"{win['model']}_over_{win['opponent']}":
                {key: round(win[key], 4) for key in ("rate", "low", "high")}
            for win in evaluation["win_rates"]
        },
        "lm_loss": {name: round(facts["lm_loss"], 4) for name, facts in models.items()},
        "kl_to_sft": {name: round(facts["kl"]["k1"], 3) for name, facts in models.items()},
        "reward_model": {
            "accuracy": round(reward["overall"]["accuracy"], 4),
            "bayes_limit": round(labels["heldout"]["bayes_limit"], 4),
            "length_only": round(reward["overall"]["length_accuracy"], 4),
        },
        "seconds": seconds,
        "total_seconds": round(sum(seconds.values()), 1),
    }


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
