"""GRPO and RLOO, presets of the PPO page: on the command line, in recipes, in Python."""

import json

import pytest

from fastrl.cli import main
from fastrl.config import PPOConfig, SamplingConfig
from fastrl.data import word_tokenizer
from fastrl.errors import ConfigError
from fastrl.models import new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import (
    load_causal_lm,
    load_scalar_model,
    save_causal_lm,
    save_scalar_model,
)
from fastrl.presets import GRPOConfig, RLOOConfig
from fastrl.rewards import RewardModelScorer
from fastrl.runs import GRPORun, PPORun, RLOORun
from fastrl.trainers import PPOTrainer
from fastrl.types import Prompt

REQUIRED = {"model_name_or_path": "m", "output_dir": "o", "prompts": ("p",), "reward_model": "r"}


def test_defaults_are_the_sources():
    expected = {
        GRPOConfig: {"advantage": "grpo", "num_samples_per_prompt": 8, "kl_in": "loss",
                     "kl_estimator": "k3", "kl_coef": 0.04, "loss_mean": "sequence",
                     "clip_range": 0.2, "learning_rate": 1e-6, "whitens_advantages": False,
                     "missing_eos_penalty": None, "ema_decay": None, "has_critic": False},
        RLOOConfig: {"advantage": "rloo", "num_samples_per_prompt": 4, "kl_in": "reward",
                     "kl_estimator": "k1", "kl_coef": 0.05, "loss_mean": "token",
                     "learning_rate": 1e-6, "whitens_advantages": False,
                     "missing_eos_penalty": None, "ema_decay": None, "has_critic": False},
    }
    for (preset, run), names in zip(((GRPOConfig, GRPORun), (RLOOConfig, RLOORun)),
                                    expected.values(), strict=True):
        assert {name: getattr(preset(), name) for name in names} == names
        assert {name: getattr(run(**REQUIRED), name) for name in names} == names
        assert isinstance(run(**REQUIRED), PPORun) and isinstance(preset(), PPOConfig)


@pytest.mark.parametrize("make, message", [
    (lambda: GRPOConfig(advantage="gae"), "advantage: expected one of grpo, dr_grpo, got 'gae'"),
    (lambda: RLOORun(**REQUIRED, advantage="grpo"), "advantage: expected one of rloo, got 'grpo'"),
    (lambda: GRPORun(**REQUIRED, num_samples_per_prompt=1), "num_samples_per_prompt: expected at "
     "least 2, because advantage is 'grpo'"),
    (lambda: GRPORun(**REQUIRED, reference="none"), "kl_coef: expected 0, because reference is "
     "'none'"),
    (lambda: RLOOConfig(critic_trunk="policy"), "critic_trunk: expected its default"),
    (lambda: GRPOConfig(rollout_batch_size=64, minibatch_size=64, num_samples_per_prompt=7),
     "num_samples_per_prompt: expected a divisor of rollout_batch_size"),
])
def test_what_a_preset_refuses(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("command, shown", [
    ("grpo", ("--num_generations", "--beta", "[grpo]", "[0.04]", "[sequence]")),
    ("rloo", ("--num_generations", "--beta", "[rloo]", "[0.05]", "the other responses"))])
def test_help_shows_the_presets_defaults_and_the_names_people_know(capsys, command, shown):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in shown)


@pytest.mark.parametrize("words, message", [
    (["--value_coef", "0.5"], "value_coef: expected its default"),
    (["--num_generations", "1"], "num_samples_per_prompt: expected at least 2"),
    (["--advantage", "gae"], "advantage"),
    (["--group_size", "8"], "unknown option --group_size"),
])
def test_mistakes_on_the_command_line(capsys, words, message):
    assert main(["grpo", "--model_name_or_path", "m", "--prompts", "p", "--reward_model", "r",
                 "--output_dir", "o", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_plan_has_no_critic(capsys):
    plans = {}
    for kind in ("ppo", "grpo", "rloo"):
        main(["plan", kind, "--shape", "qwen3-0.6b", "--gpu_memory", "24GiB"])
        plans[kind] = capsys.readouterr().out
    assert "critic" in plans["ppo"] and "reference" in plans["ppo"]
    for kind in ("grpo", "rloo"):
        assert "critic" not in plans[kind] and "reference" in plans[kind]


def test_advice_for_a_plan_without_critic_names_no_trunk_for_one(capsys):
    words = ["--shape", "qwen3-4b", "--gpu_memory", "12GiB", "--parking", "off"]
    main(["plan", "ppo", *words])
    assert "critic_trunk" in capsys.readouterr().out
    main(["plan", "grpo", *words])
    advice = capsys.readouterr().out
    assert "12" in advice and "critic" not in advice


@pytest.fixture
def root(tmp_path):
    """A model of whole words, a reward model, and prompts."""
    encoder = word_tokenizer("once a happy sad cat dog smiled .".split(), tmp_path / "tokenizer")
    model = new_decoder(decoder_config(
        "llama", vocab_size=encoder.max_token_id + 1, hidden_size=16, num_layers=1, num_heads=2,
        max_positions=64, bos_token_id=encoder.bos_token_id,
        eos_token_ids=encoder.eos_token_ids), seed=0)
    save_causal_lm(model, tmp_path / "model", tokenizer_from=encoder.path)
    save_scalar_model(scalar_from_causal(model, 1), tmp_path / "reward",
                      tokenizer_from=encoder.path)
    rows = [{"prompt": f"once a {word}"} for word in ("happy", "sad", "cat", "dog")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


SMALL = {"num_iterations": 2, "rollout_batch_size": 16, "minibatch_size": 8, "learning_rate": 1e-2,
         "max_prompt_tokens": 16, "eval_steps": 1, "num_eval_prompts": 1, "eval_fraction": 0.25}


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_command_trains_and_saves_a_policy_without_a_critic(root, capsys, kind):
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    assert main([kind, "--model_name_or_path", str(root / "model"), "--reward_model",
                 str(root / "reward"), "--prompts", str(root / "prompts.jsonl"), "--output_dir",
                 str(root / "run"), "--sampling.max_new_tokens", "6", *words, "--quiet"]) == 0
    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "loss/policy" in line]) == 2
    assert not [name for line in lines for name in line if "value/" in name or "critic" in name]
    assert "critic" not in (root / "run/plan.json").read_text()
    config = (root / "run/config.yaml").read_text()
    assert f"advantage: {kind}" in config
    before, after = (load_causal_lm(root / name) for name in ("model", "run/model"))
    assert any((a != b).any() for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert f"fastrl {kind} --config" in (root / "run/report.html").read_text()


def test_both_are_stages_of_a_recipe(root, capsys):
    settings = "".join(f"    {name}: {value}\n" for name, value in SMALL.items())
    stage = ("  - name: {kind}\n    kind: {kind}\n    model_name_or_path: '{model}'\n"
             "    reward_model: reward\n    prompts: [prompts.jsonl]\n"
             "    sampling: {{max_new_tokens: 6}}\n" + settings)
    (root / "groups.yaml").write_text(
        "name: groups\nstages:\n" + stage.format(kind="grpo", model="model")
        + stage.format(kind="rloo", model="@grpo"))
    words = [str(root / "groups.yaml"), "--data_root", str(root)]
    assert main(["run", *words, "--output_dir", str(root / "out"), "--quiet"]) == 0
    assert (root / "out/grpo/finished.json").exists() and (root / "out/rloo/finished.json").exists()
    assert "RLOO" in (root / "out/report.html").read_text()
    (root / "groups.yaml").write_text((root / "groups.yaml").read_text().replace(
        "num_iterations: 2", "num_iterations: 2\n    num_samples_per_prompt: 1", 1))
    assert main(["run", *words, "--output_dir", str(root / "again")]) == 2
    assert "stage 'grpo'" in capsys.readouterr().err


def test_python_takes_the_preset_in_place_of_a_ppo_config(root):
    policy, reference = load_causal_lm(root / "model"), load_causal_lm(root / "model")
    settings = {name: value for name, value in SMALL.items() if name != "eval_fraction"}
    config = GRPOConfig(**settings, sampling=SamplingConfig(max_new_tokens=6))
    trainer = PPOTrainer(config, policy, reference, None,
                         RewardModelScorer(load_scalar_model(root / "reward")),
                         [Prompt((2, 3), "")])
    assert trainer.step()["ratio/first_minibatch_max_error"] < 1e-4
