"""Runs that are killed and continued end with the bits of the run that never stopped."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastrl.cli import main
from fastrl.console import Console
from fastrl.data import word_tokenizer
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm
from fastrl.pipeline import run_recipe
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.ppo import PPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer

WORDS = "once there was a happy sad cat dog who smiled cried and played .".split()
RECIPE = """
name: tiny
seed: 3
stages:
  - {name: sft, kind: sft, model_name_or_path: model, data: [demonstrations.jsonl],
     eval_fraction: 0.25, batch_size: 2, max_steps: 4, eval_steps: 1, select_by: loss,
     residual_dropout: 0.1, learning_rate: 1e-2, save_steps: 1}
  - {name: reward, kind: reward, model_name_or_path: "@sft", data: [rankings.jsonl],
     eval_fraction: 0.25, batch_size: 2, max_steps: 4, eval_steps: 2, learning_rate: 1e-2,
     save_steps: 1}
  - {name: dpo, kind: dpo, model_name_or_path: "@sft", data: [rankings.jsonl],
     eval_fraction: 0.25, batch_size: 2, max_steps: 4, learning_rate: 1e-2, save_steps: 1}
  - {name: ppo, kind: ppo, model_name_or_path: "@sft", reward_model: "@reward",
     prompts: [prompts.jsonl], eval_fraction: 0.25, num_iterations: 4, rollout_batch_size: 4,
     minibatch_size: 2, sampling: {max_new_tokens: 4}, eval_steps: 1, num_eval_prompts: 2,
     best_of_n: 2, ema_decay: 0.5, learning_rate: 1e-3, save_steps: 1}
"""
TRAINERS = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer, "ppo": PPOTrainer}


class Killed(BaseException):
    """Passes what handles errors, as a kill would."""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of whole words, and data."""
    root = tmp_path_factory.mktemp("data")
    encoder = word_tokenizer(WORDS, root / "tokenizer")
    model = new_decoder(decoder_config(
        "llama", vocab_size=encoder.max_token_id + 1, hidden_size=16, num_layers=1, num_heads=2,
        max_positions=64, bos_token_id=encoder.bos_token_id,
        eos_token_ids=encoder.eos_token_ids), seed=0)
    save_causal_lm(model, root / "model", tokenizer_from=encoder.path)
    prompts = [f"once there was a {one} {two}" for one in WORDS[4:8] for two in WORDS[6:9]]
    write_rows(root / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    write_rows(root / "demonstrations.jsonl", [
        {"prompt": prompt, "completion": f" {WORDS[i % 14]} smiled ."}
        for i, prompt in enumerate(prompts)])
    write_rows(root / "rankings.jsonl", [
        {"prompt": prompt, "completions": [{"text": f" who {WORDS[(i + r) % 14]} .", "rank": r}
                                           for r in range(3)]}
        for i, prompt in enumerate(prompts)])
    (root / "recipe.yaml").write_text(RECIPE)
    return root


def run(data: Path, folder: Path, *overrides: str, text: io.StringIO | None = None,
        **options: Any) -> str:
    """Run the recipe; return what was printed, which goes to `text` too."""
    text = text or io.StringIO()
    run_recipe(data / "recipe.yaml", data_root=data, output_dir=folder, overrides=overrides,
               console=Console(file=text), **options)
    return text.getvalue()


@pytest.fixture(scope="module")
def whole(data: Path) -> Path:
    """The run that never stopped."""
    run(data, data / "whole")
    return data / "whole"


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Any], dict[str, int]]]:
    """Every finished step as (stage, number), and stage -> the step at whose end it is killed."""
    done: list[Any] = []
    deadly: dict[str, int] = {}

    def watched(name: str, step: Any) -> Any:
        def stepped(self: Any) -> Any:
            metrics = step(self)
            number = self.iteration if name == "ppo" else self.num_finished
            done.append((name, number))
            if deadly.get(name) == number:
                del deadly[name]
                for file in ("metrics.jsonl", "alarms.jsonl"):
                    with (self.run.path / file).open("a") as torn:
                        torn.write('{"step": 3, "loss/tr')
                raise Killed
            return metrics
        return stepped

    for name, trainer in TRAINERS.items():
        monkeypatch.setattr(trainer, "step", watched(name, trainer.step))
    yield done, deadly


def results(folder: Path) -> dict[str, bytes]:
    """Every file of a stage but those that hold times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and "checkpoints" not in path.parts
            and path.name not in ("timing.jsonl", "run.json", "finished.json", "config.yaml",
                                  "plan.json", "report.html")}


def same(one: Path, other: Path) -> None:
    """Both stages have the same files with the same bits."""
    first, second = results(one), results(other)
    assert "model/model.safetensors" in first and "metrics.jsonl" in first
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_kind_of_stage_goes_on_where_it_was(data: Path, whole: Path, tmp_path: Path,
                                                  steps: Any) -> None:
    done, deadly = steps
    deadly |= dict.fromkeys(TRAINERS, 3)
    for _ in TRAINERS:
        with pytest.raises(Killed):
            run(data, tmp_path / "run")
    printed = run(data, tmp_path / "run")
    assert "ppo: continues after step 2" in printed
    # Step 3 was not saved: it is done again, and those before it are not.
    assert done == [(name, number) for name in TRAINERS for number in (1, 2, 3, 3, 4)]
    for name in TRAINERS:
        same(whole / name, tmp_path / "run" / name)
    assert not list((tmp_path / "run").glob("*interrupted*"))


def cut_metrics(stage: Path) -> None:
    os.truncate(stage / "metrics.jsonl", 10)


def damage_checkpoints(stage: Path) -> None:
    for path in stage.glob("checkpoints/*/state.safetensors"):
        path.write_bytes(b"x" + path.read_bytes()[1:])


def remove_checkpoints(stage: Path) -> None:
    shutil.rmtree(stage / "checkpoints")


@pytest.mark.parametrize("damage, overrides, from_scratch, reason", [
    (None, ("sft.learning_rate=0.02",), False, "learning_rate: 0.01 -> 0.02"),
    (None, (), True, "--from_scratch was given"),
    (cut_metrics, (), False, "metrics.jsonl: expected at least"),
    (damage_checkpoints, (), False, "expected a whole checkpoint, got 2"),
    (remove_checkpoints, (), False, "expected a checkpoint, found none"),
])
def test_what_cannot_go_on_is_moved_aside_with_the_reason(
    data: Path, tmp_path: Path, steps: Any, damage: Any, overrides: tuple[str, ...],
    from_scratch: bool, reason: str,
) -> None:
    done, deadly = steps
    folder, text = tmp_path / "run", io.StringIO()
    deadly["sft"] = 3
    with pytest.raises(Killed):
        run(data, folder)
    if damage is not None:
        damage(folder / "sft")
    deadly["sft"] = 1
    with pytest.raises(Killed):
        run(data, folder, *overrides, text=text, from_scratch=from_scratch)
    assert done[-1] == ("sft", 1)
    assert "moved to sft.interrupted-1" in text.getvalue()
    assert reason in " ".join(text.getvalue().split())
    assert (folder / "sft.interrupted-1/metrics.jsonl").exists()


def test_one_damaged_checkpoint_costs_the_steps_since_the_one_before(
    data: Path, whole: Path, tmp_path: Path, steps: Any, caplog: pytest.LogCaptureFixture,
) -> None:
    done, deadly = steps
    deadly["sft"] = 3
    with pytest.raises(Killed):
        run(data, tmp_path / "run")
    os.truncate(tmp_path / "run/sft/checkpoints/step-00000002/state.json", 5)
    deadly["reward"] = 1
    with pytest.raises(Killed):
        run(data, tmp_path / "run")
    assert done[3] == ("sft", 2) and "state.json" in caplog.text
    same(whole / "sft", tmp_path / "run/sft")


def test_when_checkpoints_are_saved_may_change(data: Path, whole: Path, tmp_path: Path,
                                               steps: Any) -> None:
    done, deadly = steps
    deadly["sft"] = 3
    with pytest.raises(Killed):
        run(data, tmp_path / "run")
    deadly["reward"] = 1
    with pytest.raises(Killed):
        run(data, tmp_path / "run", "sft.save_steps=3", "sft.save_total_limit=1")
    same(whole / "sft", tmp_path / "run/sft")
    assert done[3] == ("sft", 3)


def test_a_signal_ends_a_rollout_and_the_iteration_before_is_saved(
    data: Path, whole: Path, tmp_path: Path, steps: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, deadly = steps
    settings = "ppo.save_steps=100"
    deadly["ppo"] = 1
    with pytest.raises(Killed):
        run(data, tmp_path / "run", settings)
    update = PPOTrainer._update

    def update_and_ask(self: Any, *args: Any) -> Any:
        """Sends a signal at the beginning of the third rollout."""
        generate = self.engine.generate

        def ask(*prompts: Any, **options: Any) -> Any:
            if self.iteration == 2 and "on_progress" in options:
                os.kill(os.getpid(), signal.SIGINT)
            return generate(*prompts, **options)

        if self.iteration == 1:
            monkeypatch.setattr(self.engine, "generate", ask)
        return update(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(PPOTrainer, "_update", update_and_ask)
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "run", settings)
    assert done[-1] == ("ppo", 2)
    printed = run(data, tmp_path / "run", settings)
    assert "ppo: continues after step 2" in printed and done[-2:] == [("ppo", 3), ("ppo", 4)]
    same(whole / "ppo", tmp_path / "run/ppo")


def read_if_there(path: Path) -> str:
    return path.read_text() if path.exists() else ""


LONG = ("--max_steps", "150", "--batch_size", "2", "--eval_fraction", "0.25", "--eval_steps", "50",
        "--learning_rate", "1e-3", "--quiet")


@pytest.mark.parametrize("number, code, saves", [
    (signal.SIGKILL, -9, ("--save_steps", "10")), (signal.SIGTERM, 143, ())])
def test_a_command_that_a_signal_ends_goes_on(data: Path, tmp_path: Path, number: int, code: int,
                                              saves: tuple[str, ...]) -> None:
    words = ["sft", "--model_name_or_path", str(data / "model"), "--data",
             str(data / "demonstrations.jsonl"), *LONG]
    if not (data / "long").exists():
        assert main([*words, "--output_dir", str(data / "long")]) == 0
        assert not (data / "long/checkpoints").exists()  # ten minutes were not over
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-m", "fastrl", *words, *saves, "--output_dir",
                                str(folder)], stderr=subprocess.PIPE)
    while not ((folder / "checkpoints/step-00000020").exists() if saves else
               '"step": 9,' in read_if_there(folder / "metrics.jsonl")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    assert saves or b"a second signal stops at once" in said
    assert not (folder / "finished.json").exists()
    assert main(["sft", "--resume", str(folder)]) == 0
    assert 0 < json.loads((folder / "run.json").read_text())["resumed_from"] < 150
    same(data / "long", folder)


def test_what_cannot_be_resumed_is_refused(data: Path, whole: Path, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--resume", str(tmp_path)], "expected the folder of a run"),
        (["--resume", str(whole / "sft")], "one that is finished"),
        (["--resume", str(whole / "sft"), "--output_dir", str(tmp_path)], "leave output_dir out"),
    ):
        assert main(["sft", *words]) == 2
        assert reason in capsys.readouterr().err
