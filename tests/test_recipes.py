"""The recipes in recipes/: their settings, and their short forms on real models and data."""

import io
import json
import math
import re
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.pipeline import run_recipe
from fastrl.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


@pytest.mark.parametrize("name", ["stories", "human", "stories_rloo", "stories_dpo", "gsm8k_grpo",
                                  "compare", "flawed"])
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
def test_the_short_flawed_study_has_both_scores_their_fits_and_a_best_of_n(
        required_shared, tmp_path):
    run_short("flawed", required_shared, tmp_path / "run")
    rows = [json.loads(line) for line in
            (tmp_path / "run/rloo/watch.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and rows[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert any(row["proxy"] > row["gold"] for row in rows)  # what repetition is paid
    page = (tmp_path / "run/report.html").read_text()
    for words in ("gain against sqrt(KL)", "d (a - b log d)", "d (a - b d)",
                  "optimised score, best of n", "gold score, best of n"):
        assert words in page


def test_dpo_has_the_rankings_of_ppo_and_nothing_else():
    ppo, dpo = ({stage.name: stage for stage in load_recipe(RECIPES / name).stages}
                for name in ("stories.yaml", "stories_dpo.yaml"))
    assert [stage.kind for stage in dpo.values()] == ["prompts", "rank", "dpo", "evaluate"]
    for stage in ("prompts", "rank"):
        given = dpo[stage].config
        assert all(getattr(given, name) == getattr(ppo[stage].config, name)
                   for name in given.__dataclass_fields__ if name != "seed")
    for name in ("prompts", "num_prompts", "labeler", "sampling"):
        assert getattr(dpo["evaluation"].config, name) == getattr(ppo["evaluation"].config, name)


@pytest.mark.slow
def test_stories_dpo_short_form_runs_on_the_real_model(required_shared, tmp_path):
    run_short("stories_dpo", required_shared, tmp_path / "run")
    lines = [json.loads(line) for line in
             (tmp_path / "run/dpo/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/dpo"] for line in lines if "loss/dpo" in line]
    assert len(losses) == 3 and losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]
    result = json.loads((tmp_path / "run/evaluation/evaluation.json").read_text())
    assert result["judge"] == "lexicon" and set(result["models"]) == {"initial", "dpo"}
    assert result["models"]["dpo"]["kl"]["k1"] > result["models"]["initial"]["kl"]["k1"]


def test_the_comparison_gives_every_method_one_budget():
    stages = {stage.name: stage.config for stage in load_recipe(RECIPES / "compare.yaml").stages}
    assert len(stages) == 3 * 14
    for seed in (1, 2, 3):
        world = 840  # training prompts, tests/demo/test_run.py
        budget = world * stages[f"rank-{seed}"].num_samples_per_prompt
        for name in ("ppo", "ppo_ptx", "grpo", "rloo", "reinforce"):
            run = stages[f"{name}-{seed}"]
            assert run.num_iterations * run.rollout_batch_size == budget == 3360
            assert run.reward_model == f"@reward-{seed}" and run.kl_coef > 0
        best = stages[f"best-{seed}"]
        assert best.num_prompts * best.num_samples_per_prompt == budget
        assert stages[f"dpo-{seed}"].data == (f"@rank-{seed}/rankings.jsonl",)
        assert stages[f"reward-{seed}"].data == (f"@rank-{seed}/rankings.jsonl",)
        assert stages[f"ppo_ptx-{seed}"].ptx_coef > 0 == stages[f"ppo-{seed}"].ptx_coef
        evaluation = stages[f"evaluation-{seed}"]
        assert evaluation.best_of_n == 16 and evaluation.labeler == "world"
        assert [pair[0] for pair in evaluation.pairs] == [
            "ppo", "ppo-ptx", "grpo", "rloo", "reinforce++", "dpo", "best-of-16", "rejection"]
    assert [stages[f"{name}-1"].advantage for name in ("ppo", "grpo", "rloo", "reinforce")] == [
        "gae", "grpo", "rloo", "reinforce_plus_plus"]


@pytest.mark.slow
def test_the_short_comparison_ends_in_one_table_and_one_plot(tmp_path):
    run_short("compare", tmp_path, tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    pooled = page.split("Each seed alone")[0]
    assert "2 seeds together" in pooled and "win rate over sft against KL" in pooled
    rows = dict(re.findall(r'<tr><th scope="row">([^<]+)</th><td>sft</td>(.*?)</tr>', pooled))
    assert set(rows) == {"ppo", "ppo-ptx", "grpo", "rloo", "reinforce++", "dpo", "best-of-16",
                         "rejection"}
    seeds = [json.loads((tmp_path / f"run/evaluation-{seed}/evaluation.json").read_text())
             for seed in (1, 2)]
    for name, row in rows.items():
        rates = [win["rate"] for seed in seeds for win in seed["win_rates"]
                 if win["model"] == name]
        assert f'{rates[0]:.3f}, {rates[1]:.3f}' in row
    tokens = {name: [int(cell.replace(",", "")) for cell in re.findall(r"<td>([\d,]+)</td>", row)]
              for name, row in rows.items()}
    assert len({labels for labels, _ in tokens.values()}) == 1  # all from the same rankings
    assert all((training == 0) == (name in ("dpo", "best-of-16"))
               for name, (_, training) in tokens.items())


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
