"""The paper's values are the defaults, and settings out of bounds are refused."""

import pytest

from fastrl.config import EngineConfig, PPOConfig, RewardConfig, SamplingConfig, SFTConfig
from fastrl.errors import ConfigError
from fastrl.runs import PPORun, RankRun

# Ouyang et al. 2022 (arXiv 2203.02155), section 3 and appendix C; None: the paper is silent and
# the value is that of Ziegler et al. 2019 or Stiennon et al. 2020.
DEFAULTS = [
    (SFTConfig, {
        "learning_rate": 9.65e-6, "batch_size": 32, "num_epochs": 16, "residual_dropout": 0.2,
        "lr_schedule": "cosine", "min_lr_ratio": 0.1, "warmup_steps": 0, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "max_seq_tokens": 2048, "loss_on": "completion", "packing": False,
        "ptx_ratio": 0.0}),
    (RewardConfig, {
        "learning_rate": 9e-6, "batch_size": 64, "num_epochs": 1, "lr_schedule": "cosine",
        "min_lr_ratio": 0.1, "warmup_steps": 0, "ties": "kept_pairs",
        "shift_to_demonstrations": True}),
    (PPOConfig, {
        "learning_rate": 2.55e-6, "critic_learning_rate": 9e-6, "lr_schedule": "constant",
        "warmup_steps": 10, "warmup_start_ratio": 0.1, "rollout_batch_size": 512,
        "minibatch_size": 64, "num_inner_epochs": 1, "num_iterations": 500,
        "num_samples_per_prompt": 1, "max_prompt_tokens": 1024, "kl_coef": 0.02,
        "kl_controller": "fixed", "kl_estimator": "k1", "gamma": 1.0, "lam": 0.95,
        "clip_range": 0.2, "value_clip_range": 0.2, "ema_decay": 0.992, "eval_with_ema": True,
        "ptx_coef": 0.0, "ptx_ratio": 8.0, "missing_eos_penalty": -1.0, "adam_epsilon": 1e-5,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "critic_init": "reward", "kl_target": 6.0,
        "kl_horizon": 10000.0, "whiten_rewards": False, "whitens_advantages": True,
        "advantage": "gae", "kl_in": "reward", "loss_mean": "token"}),
    (SamplingConfig, {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
        "greedy": False}),
]


@pytest.mark.parametrize(("cls", "expected"), DEFAULTS, ids=[cls.__name__ for cls, _ in DEFAULTS])
def test_defaults_are_the_papers(cls, expected):
    config = cls()
    assert {name: getattr(config, name) for name in expected} == expected


def test_the_stages_settings_have_the_trainers_defaults():
    names = {"model_name_or_path": "m", "output_dir": "o", "prompts": ("p",)}
    ppo = PPORun(**names, reward_model="r")
    assert (ppo.kl_coef, ppo.rollout_batch_size, ppo.ema_decay) == (0.02, 512, 0.992)
    rank = RankRun(model_name_or_path="m", output_dir="o", prompts="p")
    assert rank.num_samples_per_prompt in range(4, 10)  # paper: 4 to 9


@pytest.mark.parametrize(("cls", "settings", "message"), [
    (SamplingConfig, {"temperature": 0.0}, "temperature: expected a number above 0, got 0.0"),
    (SamplingConfig, {"top_p": 0.0}, "top_p: expected a number above 0 and at most 1"),
    (SamplingConfig, {"min_p": 1.0}, "min_p: expected a number from 0 to below 1"),
    (SamplingConfig, {"top_k": -1}, "top_k: expected a number of at least 0"),
    (SamplingConfig, {"max_new_tokens": 0}, "max_new_tokens: expected a number above 0"),
    (SamplingConfig, {"max_new_tokens": 4, "min_new_tokens": 5}, r"at most max_new_tokens \(4\)"),
    (EngineConfig, {"page_size": 0}, "page_size: expected a number above 0"),
    (SFTConfig, {"learning_rate": float("nan")}, "learning_rate: expected a number above 0"),
    (SFTConfig, {"adam_beta2": 1.0}, "adam_beta2: expected a number from 0 to below 1"),
    (SFTConfig, {"min_lr_ratio": 1.1}, "min_lr_ratio: expected a number from 0 to 1"),
    (SFTConfig, {"residual_dropout": 1.0}, "residual_dropout: expected a number from 0 to below"),
    (SFTConfig, {"report_to": ("wandb",)}, "report_to: expected only 'tensorboard', got 'wandb'"),
    (SFTConfig, {"ptx_ratio": -1.0}, "ptx_ratio: expected a number of at least 0"),
    (SFTConfig, {"seed": -1}, "seed: expected a number of at least 0"),
    (RewardConfig, {"batch_size": 0}, "batch_size: expected a number above 0"),
    (RewardConfig, {"eval_steps": 0}, "eval_steps: expected a number above 0"),
    (PPOConfig, {"minibatch_size": 100}, r"a divisor of rollout_batch_size \(512\), got 100"),
    (PPOConfig, {"num_samples_per_prompt": 3}, r"num_samples_per_prompt: expected a divisor"),
    (PPOConfig, {"gamma": 1.1}, "gamma: expected a number from 0 to 1"),
    (PPOConfig, {"lam": -0.1}, "lam: expected a number from 0 to 1"),
    (PPOConfig, {"ema_decay": 1.0}, "ema_decay: expected None or a number from 0 to below 1"),
    (PPOConfig, {"kl_coef": -0.1}, "kl_coef: expected a number of at least 0"),
    (PPOConfig, {"clip_range": 0.0}, "clip_range: expected a number above 0"),
    (PPOConfig, {"max_kl": 0.0}, "max_kl: expected a number above 0"),
])
def test_values_out_of_bounds_are_named(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)
