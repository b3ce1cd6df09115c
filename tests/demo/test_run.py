"""The demo end to end: a short form that exercises every stage, and the full form's promises."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastrl.console import Console
from fastrl.demo.run import run_demo
from fastrl.errors import ConfigError
from fastrl.world_files import write_world

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
    for win in summary["win_rates"].values():  # 95% intervals
        assert set(win) == {"rate", "low", "high"} and win["low"] < win["rate"] < win["high"]
    assert set(summary["kl_to_sft"]) == {"base", "sft", "ppo", "ppo_ptx"}
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


def test_a_folder_of_something_else_or_of_another_seed_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="expected a new or empty folder, or one of an earlier"):
        run_demo(tmp_path / "photos", console=console)
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/demo.json").write_text('{"seed": 3}')
    with pytest.raises(ConfigError, match="holds a demo with seed 3, expected 4"):
        run_demo(tmp_path / "demo", seed=4, console=console)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.jpg", "demo", "demo.json",
                                                                "photos"]


@pytest.mark.slow
def test_the_first_answer_is_on_screen_within_ten_seconds(tmp_path: Path) -> None:
    begin, seen = time.monotonic(), []
    with subprocess.Popen(
        [sys.executable, "-m", "fastrl", "demo", "--output_dir", str(tmp_path / "demo")],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # as on a terminal
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            seen.append(line)
            if line.startswith("  base ") and len(line.split()) > 4:
                break
        seconds = time.monotonic() - begin
        demo.kill()
    assert seen[-2].startswith("  prompt ") and "answer :" in seen[-2]
    assert seconds <= 10, f"{seconds:.1f} s"


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
