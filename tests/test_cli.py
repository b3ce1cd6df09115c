"""The command line: every command answers, mistakes are named, help is fast."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import fastrl.demo.run
import fastrl.pipeline
import fastrl.planning
from fastrl import cli
from fastrl.config import PPOConfig, SamplingConfig
from fastrl.data import word_tokenizer
from fastrl.errors import ConfigError, DataError
from fastrl.models import new_decoder
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm
from fastrl.options import Parser, field_sentences, options, read_options
from fastrl.runs import PPORun, RankRun, RewardRun, SFTRun

PPO_NAMES = ["--model_name_or_path", "m", "--reward_model", "r", "--prompts", "a.jsonl", "b.jsonl",
             "--output_dir", "out"]


def read(*argv: str, cls: type = PPORun) -> Any:
    return read_options(Parser(prog="fastrl ppo", allow_abbrev=False), cls, argv)[0]


def run_cli(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fastrl", *argv], capture_output=True, text=True,
                          cwd=cwd or Path(__file__).parents[1], timeout=120)


@pytest.fixture
def workshop(tmp_path: Path) -> Path:
    """A folder with a tiny random model `m`, demonstrations and prompts."""
    words = [f"w{i}" for i in range(20)]
    encoder = word_tokenizer(words, tmp_path / "tokenizer")
    config = decoder_config("llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                            num_layers=1, num_heads=2, max_positions=32,
                            eos_token_ids=encoder.eos_token_ids)
    save_causal_lm(new_decoder(config, seed=0), tmp_path / "m", tokenizer_from=encoder.path)
    rows = [{"prompt": f"w{i} w1", "completion": "w2 w3"} for i in range(12)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


# Help and start-up


def test_help_version_and_no_command() -> None:
    for argv in ([], ["--help"], ["-h"]):
        result = run_cli(*argv)
        assert result.returncode == 0 and result.stderr == ""
        for command in ("demo", "sft", "reward", "ppo", "dpo", "run", "generate", "chat",
                        "merge", "doctor"):
            assert f"\n  {command} " in result.stdout
    assert run_cli("--version").stdout == "fastrl 0.1.0\n"


@pytest.mark.parametrize("command", ["demo", "sft", "reward", "ppo", "dpo", "run", "generate",
                                     "chat", "merge", "doctor"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: fastrl {command}" in capsys.readouterr().out


def test_help_shows_the_sentence_under_each_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["ppo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--kl_coef NUMBER beta, weight of the per-token KL penalty" in text
    assert "[0.02]" in text
    assert "--sampling.top_k INT Keep the k most likely tokens; 0 keeps all. [0]" in text


@pytest.mark.parametrize("cls", [PPORun, SFTRun, RewardRun, RankRun])
def test_every_option_has_a_sentence(cls: type) -> None:
    assert [option.name for option in options(cls) if not option.sentence] == []


def test_help_is_fast_and_light() -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        run_cli("--help")
        seconds.append(time.perf_counter() - begin)
    assert statistics.median(seconds) < 1.0  # target 0.5 s on one free core
    code = ("import sys; from fastrl.cli import main; main(['--help']); "
            "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'rich')))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True,
                          cwd=Path(__file__).parents[1]).returncode == 0


# Options and files


def test_options_become_config_fields() -> None:
    config = read(*PPO_NAMES, "--kl_coef", "1e-3", "--max_grad_norm", "null", "--whiten_rewards",
                  "--keep_best", "false", "--sampling.temperature=0.5",
                  "--sampling.stop_token_ids", "1", "2", "--sampling.stop_strings", "\n\n", "[x",
                  "--source_weights", "{web: 1, books: 0.5}", "--seed", "7")
    assert config.prompts == ("a.jsonl", "b.jsonl")
    assert (config.kl_coef, config.max_grad_norm, config.seed) == (0.001, None, 7)
    assert config.whiten_rewards is True and config.keep_best is False
    assert config.sampling == SamplingConfig(temperature=0.5, stop_token_ids=(1, 2),
                                             stop_strings=("\n\n", "[x"))
    assert config.source_weights == {"web": 1.0, "books": 0.5}
    assert config.lam == PPOConfig().lam


def test_text_options_stay_text() -> None:
    names = [*PPO_NAMES[2:], "--model_name_or_path", "1e3"]
    assert read(*names).model_name_or_path == "1e3"
    assert read(*PPO_NAMES, "--reference_model", "null").reference_model is None


def test_config_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("model_name_or_path: m\nreward_model: r\nprompts: [p.jsonl]\nkl_coef: 0.1\n"
                    "sampling: {max_new_tokens: 5, temperature: 0.7}\n")
    config = read("--config", str(path), "--output_dir", "o", "--kl_coef", "0.2",
                  "--sampling.temperature", "0.9")
    assert (config.kl_coef, config.prompts) == (0.2, ("p.jsonl",))
    assert config.sampling == SamplingConfig(max_new_tokens=5, temperature=0.9)


@pytest.mark.parametrize(("argv", "message"), [
    (["--kl_coeff", "1"], "unknown option --kl_coeff; did you mean --kl_coef?"),
    (["--kl-coef", "1"], "unknown option --kl-coef; did you mean --kl_coef?"),
    (["--sampling.temp", "1"], "did you mean --sampling.temperature?"),
    (["--max_new_tokens", "8"], "did you mean --sampling.max_new_tokens?"),
    (["--zzzzzz"], "unknown option --zzzzzz; `fastrl ppo --help` lists them"),
    (["--kl_coef", "abc"], "kl_coef: expected a number, got 'abc'"),
    (["--num_iterations", "1.5"], "num_iterations: expected a whole number, got 1.5"),
    (["--kl_coef", "-1"], "kl_coef: expected a number of at least 0, got -1"),
    (["--lr_schedule", "step"], "lr_schedule: expected one of 'constant', 'cosine', 'linear'"),
    (["--whiten_rewards", "maybe"], "whiten_rewards: expected true or false, got 'maybe'"),
    (["--sampling.top_k", "5"], "sampling: expected plain sampling"),
    (["--kl_coef"], "argument --kl_coef: expected one argument"),
    (["--seed", "!!python/name:os.system"], "--seed, line 1, column 1: tags"),
])
def test_mistakes_on_the_command_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(*PPO_NAMES, *argv)
    assert message in str(caught.value)


def test_words_without_an_option() -> None:
    with pytest.raises(ConfigError, match="unexpected 'extra'; settings are given as --name value"):
        read("extra", *PPO_NAMES)


def test_missing_settings_are_listed() -> None:
    with pytest.raises(ConfigError, match="missing 'model_name_or_path', 'output_dir', 'prompts'"):
        read()


@pytest.mark.parametrize(("text", "message"), [
    ("kl_coeff: 1\n", "unknown key 'kl_coeff'; did you mean 'kl_coef'?"),
    ("sampling: {temprature: 1}\n", "unknown key 'temprature'; did you mean 'temperature'?"),
    ("kl_coef: 1\nkl_coef: 2\n", "line 2, column 1: key 'kl_coef' is given twice"),
    ("kl_coef: !!python/object/apply:os.system [ls]\n", "line 1, column 10: tags"),
    ("packing: no\n", "unknown key 'packing'"),
    ("kl_coef: '1'\n", "kl_coef: expected a number, got '1'"),
    ("sampling: 3\n", "sampling: expected settings"),
])
def test_mistakes_in_a_config_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(*PPO_NAMES, "--config", str(path))
    assert message in str(caught.value) and "ppo.yaml" in str(caught.value)


def test_setting_inside_a_value_that_has_none(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("sampling: 3\n")
    with pytest.raises(ConfigError, match="sampling: expected settings"):
        read(*PPO_NAMES, "--config", str(path), "--sampling.temperature", "1")


def test_field_sentences_are_inherited_and_joined() -> None:
    @dataclass
    class Base:
        """Base."""

        a: int = 0
        """First
        sentence."""
        b: int = 0
        """Second."""

    @dataclass
    class Derived(Base):
        """Derived."""

        b: int = 1
        c: int = 2
        """Third."""

    assert field_sentences(Derived) == {"a": "First sentence.", "b": "Second.", "c": "Third."}


# Dispatch and exit codes


def test_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pop"]) == 2
    assert capsys.readouterr().err == "fastrl: error: unknown command 'pop'; did you mean 'ppo'?\n"


def test_errors_are_one_message_without_a_traceback() -> None:
    result = run_cli("ppo", *PPO_NAMES, "--kl_coeff", "1")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == ("fastrl: error: fastrl ppo: unknown option --kl_coeff; did you mean "
                             "--kl_coef?\n")


@pytest.mark.parametrize(("error", "code"), [(DataError("a.jsonl, line 3: broken"), 2),
                                             (PermissionError(13, "Permission denied", "ro/x"), 2),
                                             (OSError(28, "No space left on device"), 2),
                                             (KeyboardInterrupt(), 130)])
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch,
                    capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(fastrl.pipeline, "run_stage", fail)
    assert cli.main(["ppo", *PPO_NAMES]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_unexpected_exceptions_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(fastrl.pipeline, "run_stage", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["ppo", *PPO_NAMES])


def test_run_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[Path, dict[str, Any]]] = []

    def record(recipe: Path, **kwargs: Any) -> Path:
        calls.append((recipe, kwargs))
        return tmp_path / "report.html"

    monkeypatch.setattr(fastrl.pipeline, "run_recipe", record)
    assert cli.main(["run", "recipes/stories.yaml", "--data_root", "d", "--short", "--quiet",
                     "--ppo.kl_coef", "0.1", "--seed=3", "--ppo.sampling.max_new_tokens=8"]) == 0
    (recipe, kwargs), = calls
    assert recipe == Path("recipes/stories.yaml")
    assert kwargs["data_root"] == Path("d") and kwargs["output_dir"] == Path("runs/stories")
    assert kwargs["overrides"] == ["ppo.kl_coef=0.1", "seed=3", "ppo.sampling.max_new_tokens=8"]
    assert kwargs["short"] is True and kwargs["from_stage"] is None
    assert kwargs["console"].quiet
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["run", "plan"])
def test_settings_of_a_stage_may_stand_before_the_recipe(
    command: str, monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[Path, list[str]]] = []

    def record(recipe: Path, *args: Any, **kwargs: Any) -> Path:
        calls.append((recipe, kwargs.get("overrides") or args[1]))
        return recipe

    monkeypatch.setattr(fastrl.pipeline, "run_recipe", record)
    monkeypatch.setattr(fastrl.planning, "plan_recipe", record)
    for words in (["--ppo.kl_coef", "0", "r.yaml", "--seed", "-1"],
                  ["--seed=-1", "r.yaml", "--ppo.kl_coef=0"]):
        assert cli.main([command, "--quiet", *words]) == 0
    assert [(path, sorted(given)) for path, given in calls] == [
        (Path("r.yaml"), ["ppo.kl_coef=0", "seed=-1"])] * 2


@pytest.mark.parametrize(("argv", "message"), [
    (["run"], "required: recipe"),
    (["run", "r.yaml", "--dataroot", "x"], "unknown option --dataroot; did you mean --data_root?"),
    (["run", "r.yaml", "--ppo.kl_coef"], "--ppo.kl_coef: expected a value, got none"),
    (["run", "r.yaml", "--ppo.kl_coef", "--short"], "kl_coef: expected a value, got --short"),
    (["run", "r.yaml", "more.yaml"], "unexpected 'more.yaml'; settings are given as --name value"),
    (["generate", "--sampling.max_new_tokens", "8"], "did you mean --max_new_tokens?"),
    (["run", "absent.yaml"], "absent.yaml: cannot read this file"),
])
def test_mistakes_of_run(argv: list[str], message: str,
                         capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err


def test_a_stage_from_the_command_line(workshop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sft", "--model_name_or_path", str(workshop / "m"), "--data",
            str(workshop / "sft.jsonl"), "--output_dir", str(workshop / "out"), "--num_epochs",
            "1", "--batch_size", "4", "--device", "cpu"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert f"model   {workshop / 'out' / 'model'}" in out
    assert f"report  {workshop / 'out' / 'report.html'}" in out
    assert (workshop / "out" / "model" / "config.json").exists()
    assert "loss/train" in (workshop / "out" / "report.html").read_text()
    assert cli.main(argv) == 2
    assert "output_dir: expected a new or empty folder" in capsys.readouterr().err


def test_a_saved_config_repeats_a_run(workshop: Path) -> None:
    argv = ["--num_epochs", "1", "--batch_size", "4", "--device", "cpu", "--quiet"]
    first, second = workshop / "a", workshop / "b"
    assert cli.main(["sft", "--model_name_or_path", str(workshop / "m"), "--data",
                     str(workshop / "sft.jsonl"), "--output_dir", str(first), *argv]) == 0
    assert cli.main(["sft", "--config", str(first / "config.yaml"), "--output_dir", str(second),
                     "--quiet"]) == 0
    assert (first / "metrics.jsonl").read_text() == (second / "metrics.jsonl").read_text()


def test_broken_data_is_named_before_anything_is_written(workshop: Path,
                                                         capsys: pytest.CaptureFixture[str]
                                                         ) -> None:
    (workshop / "sft.jsonl").write_text('{"prompt": "w1", "completion": "w2"}\n{"prompt": "w1"}\n')
    assert cli.main(["sft", "--model_name_or_path", str(workshop / "m"), "--data",
                     str(workshop / "sft.jsonl"), "--output_dir", str(workshop / "out")]) == 2
    err = capsys.readouterr().err
    assert "sft.jsonl" in err and "line 2" in err and "completion" in err
    assert not (workshop / "out").exists()


def test_demo_gets_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(fastrl.demo.run, "run_demo",
                        lambda output_dir, **kwargs: calls.append({"to": output_dir, **kwargs}))
    assert cli.main(["demo", "--output_dir", str(tmp_path), "--seed", "4"]) == 0
    assert calls[0]["to"] == str(tmp_path) and calls[0]["seed"] == 4
    assert cli.main(["demo", "--seed", "-1"]) == 2


def test_help_names_null_as_it_is_typed(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["ppo", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Clip range of the value change; null: no clipping." in text
    assert "None" not in text
