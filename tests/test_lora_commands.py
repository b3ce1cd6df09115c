"""LoRA from the command line: stages save adapters, every command reads them, merge ends them."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastrl import cli
from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import word_tokenizer
from fastrl.models import (
    load_causal_lm,
    load_scalar_model,
    new_decoder,
    save_causal_lm,
    scalar_from_causal,
)
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_scalar_model
from fastrl.runs import EvaluateRun, SelectRun
from fastrl.stages import run_stage
from fastrl.trainers.common import packed_forward

WORDS = "once there was a happy sad cat dog who smiled cried and played .".split()
LORA = ["--lora_rank", "2", "--learning_rate", "0.05", "--lr_schedule", "constant", "--quiet",
        "--max_grad_norm", "null", "--device", "cpu"]
SEQUENCES = [[3, 4, 5, 6], [7, 8, 9]]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@torch.no_grad()
def output(model: CausalLM | ScalarModel) -> torch.Tensor:
    hidden, _ = packed_forward(model, SEQUENCES)
    return model.lm_head(hidden, torch.nn.functional.linear) if isinstance(model, CausalLM) \
        else hidden


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A model of whole words, a reward model and data."""
    encoder = word_tokenizer(WORDS, tmp_path / "tokenizer")
    model = new_decoder(decoder_config(
        "llama", vocab_size=encoder.max_token_id + 1, hidden_size=16, num_layers=1, num_heads=2,
        max_positions=64, bos_token_id=encoder.bos_token_id, tie_embeddings=False,
        eos_token_ids=encoder.eos_token_ids), seed=0)
    save_causal_lm(model, tmp_path / "model", tokenizer_from=encoder.path)
    save_scalar_model(scalar_from_causal(model, 0), tmp_path / "reward",
                      tokenizer_from=encoder.path)
    write(tmp_path / "sft.jsonl", [{"prompt": f"once a {w}", "completion": " was happy ."}
                                   for w in WORDS])
    write(tmp_path / "ranked.jsonl", [
        {"prompt": f"once a {w}", "chosen": " smiled .", "rejected": " cried ."} for w in WORDS])
    write(tmp_path / "prompts.jsonl", [{"prompt": f"once a {w}"} for w in WORDS])
    return tmp_path


def sft(world: Path, name: str = "sft", *words: str) -> Path:
    assert cli.main(["sft", "--model_name_or_path", str(world / "model"), "--data",
                     str(world / "sft.jsonl"), "--output_dir", str(world / name), "--num_epochs",
                     "2", "--select_by", "last", "--residual_dropout", "0", *LORA, *words]) == 0
    return world / name / "model"


def test_adapters_go_from_stage_to_stage_and_into_a_plain_model(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = sft(world)
    assert {path.name for path in first.iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert not list(first.glob("model*.safetensors")) and not (first / "config.json").exists()
    assert (output(load_causal_lm(first)) - output(load_causal_lm(world / "model"))
            ).abs().max() > 0.01
    assert cli.main(["ppo", "--model_name_or_path", str(first), "--reward_model",
                     str(world / "reward"), "--prompts", str(world / "prompts.jsonl"),
                     "--output_dir", str(world / "ppo"), "--num_iterations", "2",
                     "--rollout_batch_size", "8", "--minibatch_size", "4", "--missing_eos_penalty",
                     "null", "--sampling.max_new_tokens", "4", "--reference", "adapters_off",
                     "--eval_steps", "null", "--warmup_steps", "0", *LORA]) == 0
    metrics = [json.loads(line) for line in
               (world / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [abs(row["kl/policy_ref"]) < 1e-4 for row in metrics] == [True, False]
    second = world / "ppo" / "model"
    config = json.loads((second / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(first)
    assert cli.main(["generate", "--model", str(second), "--prompt", "once a cat",
                     "--output", str(world / "out.jsonl"), "--max_new_tokens", "3",
                     "--quiet"]) == 0
    merged = world / "merged"
    assert cli.main(["merge", "--model", str(second), "--output_dir", str(merged)]) == 0
    assert str(merged) in capsys.readouterr().out
    assert (merged / "tokenizer.json").exists() and (merged / "config.json").exists()
    assert torch.equal(output(load_causal_lm(merged)), output(load_causal_lm(second)))
    assert cli.main(["merge", "--model", str(second), "--output_dir", str(merged)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert cli.main(["merge", "--model", str(merged), "--output_dir", str(world / "x")]) == 2
    assert "expected a folder of adapters" in capsys.readouterr().err
    assert cli.main(["merge", "--model", str(world / "gone"), "--output_dir",
                     str(world / "x")]) == 2
    assert "gone: expected a folder of adapters, found none there" in capsys.readouterr().err
    assert cli.main(["merge", "--model", str(second), "--output_dir", str(world / "half"),
                     "--dtype", "bfloat16", "--quiet"]) == 0
    assert {t.dtype for t in load_file(world / "half" / "model.safetensors").values()} == {
        torch.bfloat16}
    save_causal_lm(load_causal_lm(world / "model", "bfloat16"), world / "model")
    assert cli.main(["merge", "--model", str(second), "--output_dir", str(world / "as_base"),
                     "--quiet"]) == 0
    assert {t.dtype for t in load_file(world / "as_base" / "model.safetensors").values()} == {
        torch.bfloat16}


def test_reward_and_dpo_save_adapters_and_a_plan_reads_them(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model_name_or_path", str(world / "model"), "--data",
              str(world / "ranked.jsonl"), *LORA]
    assert cli.main(["reward", "--output_dir", str(world / "rm"), *common]) == 0
    assert cli.main(["dpo", "--output_dir", str(world / "dpo"), *common]) == 0
    reward_model = load_scalar_model(world / "rm" / "model")
    assert reward_model.adapters is None
    assert cli.main(["merge", "--model", str(world / "rm" / "model"), "--output_dir",
                     str(world / "plain"), "--quiet"]) == 0
    assert torch.equal(output(load_scalar_model(world / "plain")), output(reward_model))
    capsys.readouterr()
    assert cli.main(["plan", "ppo", "--model_name_or_path", str(world / "dpo" / "model"),
                     "--reward_model", str(world / "rm" / "model"), "--lora_rank", "2",
                     "--reference", "adapters_off", "--device", "cpu"]) == 0
    assert "reference" not in capsys.readouterr().out


def test_chat_and_evaluate_read_adapters_as_the_model_they_merge_to(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, merged = sft(world), world / "merged"
    assert cli.main(["merge", "--model", str(adapters), "--output_dir", str(merged),
                     "--quiet"]) == 0
    folders = {"base": world / "model", "adapters": adapters, "merged": merged}
    replies = {}
    for name, folder in folders.items():
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO("once a cat\nonce a dog\n"))
        assert cli.main(["chat", "--model", str(folder), "--greedy", "--max_new_tokens", "6"]) == 0
        replies[name] = [line for line in capsys.readouterr().out.splitlines()
                         if str(folder) not in line]
    assert replies["adapters"] == replies["merged"] != replies["base"]
    (world / "mine.py").write_text(
        "def happy(prompts, completions):\n"
        "    return [float(c.split().count('happy')) for c in completions]\n")
    folder = run_stage("evaluate", EvaluateRun(
        models={name: str(path) for name, path in folders.items()}, reference="adapters",
        prompts=(str(world / "prompts.jsonl"),), output_dir=str(world / "evaluation"),
        reward_function=f"{world}/mine.py:happy", sampling=SamplingConfig(max_new_tokens=4),
        device="cpu"), console=Console(file=io.StringIO()))
    models = json.loads((folder / "evaluation.json").read_text())["models"]
    assert models["merged"]["kl"]["k3"] == pytest.approx(0, abs=1e-6)
    assert models["base"]["kl"]["k3"] > 0.01


def test_the_best_candidate_of_adapters_is_selected_by_a_function(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = sft(world, "sft", "--select_by", "reward", "--batch_size", "4").parent
    candidates = sorted(path.name for path in (stage / "candidates").iterdir())
    (world / "mine.py").write_text(
        "def happy(prompts, completions):\n"
        "    return [float(c.split().count('happy')) for c in completions]\n")
    folder = run_stage("select", SelectRun(
        model_name_or_path=str(stage / "model"), prompts=(str(world / "prompts.jsonl"),),
        output_dir=str(world / "select"), reward_function=f"{world}/mine.py:happy",
        sampling=SamplingConfig(max_new_tokens=4), device="cpu"),
        console=Console(file=io.StringIO()))
    summary = json.loads((folder / "finished.json").read_text())["summary"]
    assert set(candidates) >= set(summary["scores"]) and len(summary["scores"]) == 2
    winner = max(summary["scores"], key=summary["scores"].__getitem__)
    assert torch.equal(output(load_causal_lm(folder / "model")),
                       output(load_causal_lm(stage / "candidates" / winner)))


def damage_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_tensors(folder: Path, rename: tuple[str, str] | None = None, cut: str = "") -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    if rename is not None:
        tensors = {name.replace(*rename): tensor for name, tensor in tensors.items()}
    save_file({name: tensor[:1].clone() if cut and cut in name else tensor
               for name, tensor in tensors.items()}, path)


@pytest.mark.parametrize(("damage", "message"), [
    (lambda f: damage_config(f, use_dora=True), "expected plain LoRA, got use_dora = True"),
    (lambda f: damage_config(f, bias="all"), "expected plain LoRA, got bias = 'all'"),
    (lambda f: damage_config(f, rank_pattern={"q_proj": 4}), "got rank_pattern"),
    (lambda f: damage_config(f, peft_type="IA3"), "expected peft_type LORA"),
    (lambda f: damage_config(f, r=0), "expected peft_type LORA with r"),
    (lambda f: damage_config(f, base_model_name_or_path="org/name"), "to be a local folder"),
    (lambda f: damage_config(f, base_model_name_or_path=str(f)), "whose base is themselves"),
    (lambda f: damage_tensors(f, rename=("o_proj.lora_B", "o_proj.lora_C")), "other or missing"),
    (lambda f: damage_tensors(f, rename=("o_proj", "z_proj")), "for projections of the base"),
    (lambda f: damage_tensors(f, cut="o_proj.lora_B"), "expected an adapter that fits"),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"), "a safetensors file"),
    (lambda f: (f / "adapter_model.safetensors").unlink(), "a safetensors file"),
])
def test_adapters_that_are_none_are_refused(
    world: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = sft(world)
    damage(folder)
    assert cli.main(["generate", "--model", str(folder), "--prompt", "once"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("target", "message"), [
    ("c_attn", "expected names out of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj"),
    ("q", "got q; change lora_targets")])
def test_unknown_targets_are_refused_before_a_folder_is_made(
    world: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sft", "--model_name_or_path", str(world / "model"), "--data",
                     str(world / "sft.jsonl"), "--output_dir", str(world / "x"), *LORA,
                     "--residual_dropout", "0", "--lora_targets", target]) == 2
    assert message in capsys.readouterr().err
    assert not (world / "x").exists()


def test_a_reward_model_is_no_language_model(world: Path, capsys: pytest.CaptureFixture[str]
                                             ) -> None:
    assert cli.main(["ppo", "--model_name_or_path", str(world / "model"), "--reward_model",
                     str(sft(world)), "--prompts", str(world / "prompts.jsonl"), "--output_dir",
                     str(world / "ppo")]) == 2
    assert "adapters of a reward model with a scalar head" in capsys.readouterr().err
