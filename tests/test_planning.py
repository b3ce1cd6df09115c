"""`fastrl plan`: stages, recipes, the table of the README, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from fastrl import cli
from fastrl.config import SFTConfig, read_bytes
from fastrl.errors import ConfigError
from fastrl.models import new_decoder, save_causal_lm
from fastrl.models.families import decoder_config

ROOT = Path(__file__).parents[1]


def small_model(folder: Path) -> Path:
    save_causal_lm(new_decoder(decoder_config(
        "llama", vocab_size=61, hidden_size=64, num_layers=2, num_heads=4, max_positions=64), 0),
        folder)
    return folder


@pytest.mark.parametrize("kind", ["pretrain", "sft", "reward", "ppo", "dpo"])
def test_a_shape_needs_no_file(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", kind, "--shape", "qwen3-0.6b", "--gpu-memory", "80GiB"]) == 0
    out = capsys.readouterr().out
    assert "memory plan fits" in out and "of 80.0 GiB" in out
    assert "1.1 GiB" in out  # 596 million weights of 2 bytes


def test_a_new_model_is_planned_from_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pretrain", "--gpu-memory", "8GiB", "--vocab_size", "512",
                     "--hidden_size", "4096", "--num_layers", "1", "--num_heads", "32",
                     "--intermediate_size", "8192"]) == 0
    out = capsys.readouterr().out
    # 512 D + 4 D^2 + 3 x 8192 D + 3 D numbers for D = 4096, 2 bytes each: 323 MiB.
    assert re.search(r"policy\s.*324 MiB.*update", out)


def test_dpo_has_its_second_model_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(small_model(tmp_path))
    words = ["plan", "dpo", "--gpu-memory", "24GiB", "--model_name_or_path", folder]
    assert cli.main(words) == 0
    assert "reference" not in capsys.readouterr().out
    assert cli.main([*words, "--reference_model", folder]) == 0
    assert re.search(r"reference\s.*scoring\s.*gone", capsys.readouterr().out)


@pytest.mark.parametrize("spelling", [["--gpu-memory", "1GiB"], ["--gpu_memory", "1GiB"],
                                      ["--gpu-memory=1GiB"], ["--gpu_memory=1GiB"]])
def test_what_does_not_fit_is_exit_code_1_with_advice(
    spelling: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "sft", "--shape", "llama-3.1-8b", "--quiet", *spelling]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "does not fit" in lines[0] and "of 1.0 GiB" in lines[0]
    assert any("smaller model" in line for line in lines)


def test_options_of_the_stage_count(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "ppo", "--shape", "qwen3-0.6b", "--gpu-memory", "80GiB"]
    cli.main(words)
    assert "ema " in capsys.readouterr().out
    cli.main([*words, "--ema_decay", "null"])
    assert "ema " not in capsys.readouterr().out


def test_a_folder_is_planned_for_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_model(tmp_path)
    assert cli.main(["plan", "sft", "--model_name_or_path", str(folder), "--device", "cpu"]) == 0
    assert "memory plan fits" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["ppo"], "expected --model_name_or_path FOLDER or --shape NAME, got neither"),
    (["ppo", "--shape", "llama-3.1-8"], "llama-3.1-8b"),
    (["ppo", "--shape", "qwen3-4b", "--gpu-memory", "24"], "gpu_memory: expected a number above 0"),
    (["ppo", "--shape", "qwen3-4b", "--gpu-memory", "0GiB"], "gpu_memory: expected a number above"),
    (["ppo", "--shape", "qwen3-4b", "--kl_coeff", "1"], "did you mean --kl_coef?"),
    (["sft", "--model_name_or_path", "/nowhere/at/all"], "expected a model folder"),
    (["--table", "recipe.yaml"], "expected --table alone"),
    (["--table", "--gpu-memory", "24GB"], "expected --table alone"),
    (["--table", "--ppo.kl_coef=0"], "expected --table alone"),
    ([], "expected pretrain, sft, reward, ppo, grpo, rloo, dpo, a recipe or --table, got nothing"),
])
def test_mistakes_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]
                            ) -> None:
    assert cli.main(["plan", *words]) == 2
    assert message in capsys.readouterr().err


def test_help_calls_nothing_required_that_may_be_left_out(
    capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", "ppo", "--help"])
    out = capsys.readouterr().out
    assert "required:" not in out and "may be left out:\n  --model_name_or_path" in out


@pytest.mark.parametrize(("text", "num_bytes"), [
    ("24GiB", 24 * 2**30), ("80 GB", 80 * 10**9), ("1.5GiB", 3 * 2**29), ("900MiB", 900 * 2**20)])
def test_units(text: str, num_bytes: int) -> None:
    assert read_bytes(text, "gpu_memory") == num_bytes


def test_a_config_refuses_a_size_without_unit() -> None:
    with pytest.raises(ConfigError, match="gpu_memory: expected .* such as 24GiB"):
        SFTConfig(gpu_memory="24 gigs")


def test_a_recipe_is_planned_stage_by_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Models that do not exist yet have the shape of what they are made from."""
    small_model(tmp_path / "m")
    stages = [
        {"name": "base", "kind": "pretrain", "data": ["t.txt"], "hidden_size": 64,
         "vocab_size": 512},
        {"name": "sft", "kind": "sft", "model_name_or_path": "@base", "data": ["d.jsonl"],
         "select_by": "last"},
        {"name": "reward", "kind": "reward", "model_name_or_path": "m", "data": ["r.jsonl"]},
        {"name": "ppo", "kind": "ppo", "model_name_or_path": "@sft", "reward_model": "@reward",
         "prompts": ["p.jsonl"]},
        {"name": "dpo", "kind": "dpo", "model_name_or_path": "@sft", "data": ["r.jsonl"]}]
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps({"name": "small", "stages": stages}))
    words = ["plan", str(recipe), "--data_root", str(tmp_path), "--gpu-memory", "24GiB"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert [name for name in ("base", "sft", "reward", "ppo", "dpo") if f"{name}: phases" in out] \
        == ["base", "sft", "reward", "ppo", "dpo"]
    assert [line.split(": memory plan fits")[0] for line in out.splitlines()
            if "memory plan fits" in line] == ["base", "sft", "reward", "ppo", "dpo"]
    assert cli.main([*words, "--sft.max_seq_tokens", "4096", "--gpu-memory", "770MiB"]) == 1


def test_the_table_of_the_readme_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--table"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.count("\n") == 7 and "141 GB" in printed
    assert printed in (ROOT / "README.md").read_text("utf-8")


def test_the_plans_in_the_docs_are_what_the_command_prints(
    capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `fastrl plan` command of docs/memory.md that is followed by its verdict."""
    text = (ROOT / "docs/memory.md").read_text("utf-8")
    blocks = re.findall(r"```bash\nfastrl (plan .+?)\n```\n\n```\n(.+?)\n```", text, re.S)
    assert len(blocks) >= 2
    for command, printed in blocks:
        cli.main([*command.replace("\\\n", " ").split(), "--quiet"])
        assert capsys.readouterr().out.strip() == printed
