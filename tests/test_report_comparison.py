"""The report's comparison over seeds: what is pooled, and what each model cost."""

import json
import re

import pytest

from fastrl.report import write_report
from fastrl.report_comparison import evaluations_of_seeds, generated_tokens
from fastrl.report_files import read_stages


def write_stage(folder, kind, config=None, inputs=(), summary=None, evaluation=None, lengths=()):
    folder.mkdir(parents=True)
    lineage = {"kind": kind, "config": config or {}, "inputs": dict.fromkeys(inputs, "0")}
    (folder / "run.json").write_text(json.dumps({"stage": kind, "lineage": lineage,
                                                 "started_at": folder.name[-1]}))
    (folder / "finished.json").write_text(json.dumps({"seconds": 1.0, "summary": summary or {}}))
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "metrics.jsonl").write_text("".join(
        json.dumps({"step": step, "response/length_mean": length}) + "\n"
        for step, length in enumerate(lengths)))


def evaluation(rates, kls):
    facts = {name: {"kl": {"k1": kl, "k1_std_error": 0.1, "k3": kl}, "score_mean": kl,
                    "response_length": 10.0} for name, kl in kls.items()}
    return {"num_prompts": 50, "reference": "sft", "judge": "world", "models": facts, "samples": [],
            "best_of_n": {"name": "best-of-16", "n": 16, "kl_bound": 1.835},
            "win_rates": [{"model": name, "opponent": "sft", "rate": rate, "low": rate - 0.1,
                           "high": rate + 0.1, "num_prompts": 50, "num_ties": 0}
                          for name, rate in rates.items()]}


@pytest.fixture
def run(tmp_path):
    """Two seeds of a run; only files that the comparison reads."""
    for seed, rate in ((1, 0.8), (2, 0.9)):
        def at(name, seed=seed):
            return tmp_path / f"{name}-{seed}"
        write_stage(at("sft"), "sft")
        write_stage(at("rank"), "rank", inputs=[f"@sft-{seed}"], summary={
            "num_samples_per_prompt": 4, "rankings": {"num_prompts": 10, "response_length": 7.5}})
        write_stage(at("reward"), "reward", inputs=[
            f"@sft-{seed}", f"@rank-{seed}/rankings.jsonl", f"@rank-{seed}/heldout.jsonl"])
        write_stage(at("ppo"), "ppo", {"rollout_batch_size": 8}, [f"@sft-{seed}",
                    f"@reward-{seed}"], {"iterations": 4}, lengths=(10.0, 12.0))
        write_stage(at("dpo"), "dpo", inputs=[
            f"@sft-{seed}", f"@rank-{seed}/rankings.jsonl", f"@rank-{seed}/heldout.jsonl"])
        write_stage(at("best"), "best_of_n", inputs=[f"@sft-{seed}", f"@reward-{seed}"],
                    summary={"generated_tokens": 900})
        write_stage(at("rejection"), "sft", inputs=[f"@sft-{seed}",
                                                    f"@best-{seed}/demonstrations.jsonl"])
        models = {name: f"@{name}-{seed}" for name in ("sft", "ppo", "dpo", "rejection")}
        names = ("ppo", "dpo", "rejection", "best-of-16")
        write_stage(at("evaluation"), "evaluate", {"models": models,
                    "reward_model": f"@reward-{seed}"}, evaluation=evaluation(
            dict.fromkeys(names, rate), {"sft": 0.0, **dict.fromkeys(names, float(seed))}))
    return tmp_path


def test_every_token_that_led_to_a_model_is_counted_once(run):
    stages = read_stages(run)
    (group,) = evaluations_of_seeds(stages)
    assert [stage.name for stage in group] == ["evaluation-1", "evaluation-2"]
    spent = {name: generated_tokens(name, group[0], stages)
             for name in ("sft", "ppo", "dpo", "rejection", "best-of-16")}
    # Labels: 10 prompts x 4 x 7.5 tokens. PPO: 4 iterations x 8 responses of 11 tokens.
    assert spent == {"sft": (0, 0), "ppo": (300, 352), "dpo": (300, 0), "rejection": (300, 900),
                     "best-of-16": (300, 0)}


def test_the_page_has_one_table_and_one_plot_of_all_seeds(run):
    page = write_report(run).read_text()
    pooled, alone = page.split("Each seed alone")
    assert pooled.count("2 seeds together") == 1
    assert pooled.count("win rate over sft against KL</title>") == 1
    row = re.search(r'<tr><th scope="row">best-of-16</th>.*?</tr>', pooled).group()
    assert all(f">{cell}</td>" in row for cell in
               ("0.85", "0.8, 0.9".replace("0.8", "0.800").replace("0.9", "0.900"), "300", "160"))
    assert "at most 1.835" in pooled and alone.count("95% interval") >= 8
    svg = re.search(r'<svg viewBox="0 0 360 210" role="img" aria-labelledby="evaluation-1-pooled.*?'
                    "</svg>", pooled).group()
    assert svg.count('class="seed"') == 8 and svg.count('class="thin"') == 4
    heights = sorted(float(y) for y in re.findall(r'class="name" x="[\d.]+" y="([\d.]+)"', svg))
    assert all(below - above >= 11.9 for above, below in zip(heights, heights[1:], strict=False))


def test_one_evaluation_is_shown_as_ever(run):
    page = write_report(run / "evaluation-1").read_text()
    assert "seeds together" not in page and "Each seed alone" not in page
    assert "ppo over sft" in page
