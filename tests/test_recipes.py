"""The recipes in recipes/: their settings, and their short forms on real models and data."""

import io
import json
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.pipeline import run_recipe
from fastrl.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", ["stories", "human"])
@pytest.mark.parametrize("short", [False, True])
def test_recipes_are_valid_and_hold_no_path_of_a_machine(name, short):
    recipe = load_recipe(RECIPES / f"{name}.yaml", short=short)
    assert recipe.name == name
    for stage in recipe.stages:
        assert not [path for path in stage.references if path.startswith(("/", ".", "~"))]


def test_the_stories_recipe_asks_for_what_its_claim_needs():
    stages = {stage.name: stage.config for stage in load_recipe(RECIPES / "stories.yaml").stages}
    assert stages["evaluation"].num_prompts >= 384 and stages["prompts"].num_eval >= 384
    assert stages["rank"].num_samples_per_prompt == 6
    for name in ("rank", "ppo", "evaluation"):
        assert stages[name].sampling.stop_token_ids == (1,)
        assert stages[name].sampling.max_new_tokens == 64
    assert stages["ppo"].missing_eos_penalty is None
    assert stages["evaluation"].prompts == ("@prompts/eval.jsonl",)


def run_short(name, data_root, output_dir):
    """Run the short form; return what was printed."""
    text = io.StringIO()
    run_recipe(RECIPES / f"{name}.yaml", data_root=data_root, output_dir=output_dir, short=True,
               console=Console(file=text))
    return text.getvalue()


@pytest.mark.slow
def test_stories_short_form_runs_on_the_real_model(required_shared, tmp_path):
    run_short("stories", required_shared, tmp_path / "run")
    texts = {name: {json.loads(line)["prompt"] for line in
                    (tmp_path / f"run/prompts/{name}.jsonl").read_text().splitlines()}
             for name in ("train", "heldout", "eval")}
    assert [len(texts[name]) for name in ("train", "heldout", "eval")] == [96, 32, 48]
    assert not texts["train"] & texts["heldout"] and not texts["train"] & texts["eval"]
    assert not texts["heldout"] & texts["eval"]
    labels = json.loads((tmp_path / "run/rank/labels.json").read_text())
    assert labels["rankings"]["agreement"] == pytest.approx(0.75, abs=1e-6)
    assert 0.6 < labels["rankings"]["bayes_limit"] < 0.75
    result = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert result["models"]["initial"]["kl"]["k1"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "run/report.html").exists()


@pytest.mark.slow
def test_human_short_form_runs_on_real_data(required_shared, tmp_path):
    printed = run_short("human", required_shared, tmp_path / "run")
    assert "without a comparison" in printed  # the fully tied rankings of wmt_zhen
    report = json.loads((tmp_path / "run/reward/reward_report.json").read_text())
    assert set(report["by_source"]) == {"hh_harmless.train.jsonl", "hh_harmless.test.jsonl",
                                        "oasst_ranked.jsonl", "wmt_zhen_ranked.jsonl"}
    assert all(0 <= row["length_accuracy"] <= 1 for row in report["by_source"].values())
    result = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert set(result["models"]) == {"base", "sft", "ppo"}
    assert all(facts["lm_loss"] > 0 for facts in result["models"].values())
