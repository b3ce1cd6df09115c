"""The demo end to end: a short form that exercises every stage, and the full form's promises."""

import io
import json
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.demo.run import run_demo, write_world

SHORT = ("base.max_steps=12", "sft.max_steps=6", "reward.max_steps=6", "ppo.num_iterations=2",
         "ppo_ptx.num_iterations=2", "ppo.num_eval_prompts=8", "ppo_ptx.num_eval_prompts=8",
         "evaluation.num_prompts=16", "rank.num_samples_per_prompt=2", "base.sample_steps=6")


def test_the_same_seed_writes_the_same_world_and_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / name, seed)
    files = sorted(p.name for p in (tmp_path / "a").glob("*.*"))
    assert files == ["corpus.jsonl", "demonstrations.jsonl", "heldout.jsonl", "prompts_eval.jsonl",
                     "prompts_heldout.jsonl", "prompts_train.jsonl"]
    contents = [[(tmp_path / name / f).read_bytes() for f in files] for name in "abc"]
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_no_prompt_is_in_two_files(tmp_path: Path) -> None:
    write_world(tmp_path, 0)
    parts = [set((tmp_path / f"prompts_{name}.jsonl").read_text().splitlines())
             for name in ("eval", "heldout", "train")]
    assert [len(part) for part in parts] == [320, 120, 840]
    assert len(set().union(*parts)) == 1280


@pytest.mark.slow
def test_a_short_demo_shows_answers_and_ends_with_one_json_line(tmp_path: Path) -> None:
    screen = io.StringIO()
    summary = run_demo(tmp_path, seed=5, overrides=SHORT, console=Console(file=screen))
    lines = screen.getvalue().splitlines()
    assert json.loads(lines[-1]) == summary
    assert set(summary["win_rates"]) == {"sft_over_base", "ppo_over_sft", "ppo_ptx_over_sft"}
    assert set(summary["lm_loss"]) == {"base", "sft", "ppo", "ppo_ptx"}
    assert set(summary["reward_model"]) == {"accuracy", "bayes_limit", "length_only"}
    assert summary["kl_to_sft"]["sft"] == pytest.approx(0, abs=1e-4)
    assert set(summary["seconds"]) == {"base", "sft", "rank", "reward", "ppo", "ppo_ptx",
                                       "evaluation"}
    # The board answers the same prompts with every model trained so far.
    board = lines[lines.index("ppo after 2 steps"):]
    assert [line.split()[0] for line in board[1:5]] == ["prompt", "base", "sft", "ppo"]
    report = (tmp_path / "run/report.html").read_text()
    assert len(report) < 1_000_000 and "http" not in report.replace("http-equiv", "")


@pytest.mark.slow
def test_the_demo_keeps_its_promises(tmp_path: Path) -> None:
    """Measured on three other seeds: docs/results.md. The thresholds leave room for chance."""
    summary = run_demo(tmp_path, seed=21, console=Console(quiet=True, file=io.StringIO()))
    wins, loss = summary["win_rates"], summary["lm_loss"]
    assert summary["num_prompts"] == 320
    assert wins["sft_over_base"]["rate"] >= 0.70
    assert wins["ppo_over_sft"]["rate"] >= 0.60 and wins["ppo_over_sft"]["low"] > 0.5
    assert wins["ppo_ptx_over_sft"]["rate"] >= 0.60 and wins["ppo_ptx_over_sft"]["low"] > 0.5
    tax = loss["ppo"] - loss["sft"]
    assert tax > 0.08
    assert loss["ppo_ptx"] - loss["sft"] < tax / 2
    assert summary["reward_model"]["accuracy"] > 0.55
