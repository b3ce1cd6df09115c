"""The recipes in recipes/: their settings, and their short forms on real models and data."""

import io
import json
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.pipeline import run_recipe
from fastrl.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", ["stories", "human", "stories_rloo", "gsm8k_grpo"])
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


def test_rloo_has_the_tokens_and_the_reward_model_of_ppo():
    ppo, rloo = ({stage.name: stage.config for stage in load_recipe(RECIPES / name).stages}
                 for name in ("stories.yaml", "stories_rloo.yaml"))
    for stage in ("prompts", "rank", "reward"):
        given = {name: getattr(rloo[stage], name) for name in rloo[stage].__dataclass_fields__}
        assert given == {name: getattr(ppo[stage], name) for name in given}
    for name in ("num_iterations", "rollout_batch_size", "minibatch_size", "sampling", "kl_coef",
                 "learning_rate", "max_kl"):
        assert getattr(rloo["rloo"], name) == getattr(ppo["ppo"], name), name
    assert rloo["rloo"].num_samples_per_prompt == 8 and not rloo["rloo"].has_critic


@pytest.mark.exhaustive
def test_stories_rloo_short_form_runs_on_the_real_model(required_shared, tmp_path):
    """Left out unless asked for: all stages but one are those of `stories`."""
    run_short("stories_rloo", required_shared, tmp_path / "run")
    lines = [json.loads(line) for line in
             (tmp_path / "run/rloo/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/policy" in line]
    assert len(steps) == 2 and all(0 <= line["reward/equal_group_share"] < 1 for line in steps)
    assert all(line["ratio/first_minibatch_max_error"] < 1e-4 for line in steps)
    result = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert set(result["models"]) == {"initial", "rloo"}
    assert abs(result["models"]["rloo"]["kl"]["k1"]) < 1


@pytest.mark.slow
def test_gsm8k_grpo_short_form_runs_on_real_data(required_shared, tmp_path):
    run_short("gsm8k_grpo", required_shared, tmp_path / "run")
    lines = [json.loads(line) for line in
             (tmp_path / "run/grpo/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/policy" in line]
    assert len(steps) == 2
    for line in steps:
        parts = line["reward/part_answer_mean"] + 0.2 * line["reward/part_form_mean"]
        assert line["reward/score_mean"] == pytest.approx(parts, abs=1e-6)
