"""Settings of the stages: defaults, and what each refuses."""

import dataclasses

import pytest

from fastrl.config import SamplingConfig
from fastrl.errors import ConfigError
from fastrl.options import field_sentences
from fastrl.reward_settings import BestOfNRun, RewardPart
from fastrl.runs import (
    RUN_TYPES,
    DPORun,
    EvaluateRun,
    GRPORun,
    PPORun,
    PretrainRun,
    PromptsRun,
    RankRun,
    RewardRun,
    RLOORun,
    SelectRun,
    SFTRun,
    WorldRun,
)

REQUIRED = {
    WorldRun: {},
    PretrainRun: {"data": ("t.txt",)},
    SFTRun: {"model_name_or_path": "m", "data": ("d.jsonl",)},
    PromptsRun: {"model_name_or_path": "m"},
    RankRun: {"model_name_or_path": "m", "prompts": "p.jsonl"},
    RewardRun: {"model_name_or_path": "m", "data": ("c.jsonl",)},
    SelectRun: {"model_name_or_path": "m", "reward_model": "r", "prompts": ("p.jsonl",)},
    PPORun: {"model_name_or_path": "m", "reward_model": "r", "prompts": ("p.jsonl",)},
    GRPORun: {"model_name_or_path": "m", "reward_model": "r", "prompts": ("p.jsonl",)},
    RLOORun: {"model_name_or_path": "m", "reward_model": "r", "prompts": ("p.jsonl",)},
    DPORun: {"model_name_or_path": "m", "data": ("c.jsonl",)},
    BestOfNRun: {"model_name_or_path": "m", "reward_model": "r", "prompts": ("p.jsonl",)},
    EvaluateRun: {"models": {"a": "m", "b": "n"}, "reference": "a", "prompts": ("p.jsonl",),
                  "labeler": "lexicon"},
}


def make(cls, **settings):
    return cls(**{**REQUIRED[cls], "output_dir": "out", **settings})


@pytest.mark.parametrize("cls", REQUIRED)
def test_defaults_are_accepted_and_every_setting_is_explained(cls):
    assert make(cls).output_dir == "out"
    unexplained = [field.name for field in dataclasses.fields(cls)
                   if not field_sentences(cls)[field.name]]
    assert unexplained == []
    assert set(RUN_TYPES.values()) == set(REQUIRED)


@pytest.mark.parametrize("cls, settings, message", [
    (PretrainRun, {"data": ()}, "data: expected at least one file"),
    (PretrainRun, {"vocab_size": 0}, "vocab_size: expected a number above 0"),
    (PretrainRun, {"window_tokens": 1}, "window_tokens: expected at least 2"),
    (PretrainRun, {"window_tokens": 4096}, r"at most max_positions \(1024\)"),
    (PretrainRun, {"loss_on": "completion"}, "loss_on: expected 'all' when pretraining"),
    (PretrainRun, {"select_by": "reward"}, "select_by: expected 'last' or 'loss'"),
    (PretrainRun, {"select_by": "loss"}, "eval_data: expected held-out text"),
    (PretrainRun, {"ptx_ratio": 0.5}, "ptx_ratio: expected 0 when pretraining"),
    (PretrainRun, {"learning_rate": 0}, "learning_rate: expected a number above 0"),
    (SFTRun, {"data": ()}, "data: expected at least one file"),
    (SFTRun, {"eval_fraction": 1.0}, "eval_fraction: expected a share from 0 to below 1"),
    (SFTRun, {"ptx_ratio": 0.1}, "ptx_data: expected text files, because ptx_ratio is above 0"),
    (SFTRun, {"ptx_window_tokens": 1}, "ptx_window_tokens: expected at least 2"),
    (SFTRun, {"residual_dropout": 1.0}, "residual_dropout: expected"),
    (PromptsRun, {"min_tokens": 20}, r"min_tokens: expected at most max_tokens \(15\)"),
    (PromptsRun, {"num_eval": 0}, "num_eval: expected a number above 0"),
    (PromptsRun, {"source_weights": {"a": 1.0}}, "data: expected prompt files"),
    (RankRun, {"num_samples_per_prompt": 1}, "num_samples_per_prompt: expected at least 2"),
    (RankRun, {"noise_scale": 1.0}, "exactly one of noise_scale and target_agreement"),
    (RankRun, {"target_agreement": None}, "exactly one of noise_scale and target_agreement"),
    (RankRun, {"target_agreement": 0.5}, "target_agreement: expected a share above 0.5"),
    (RankRun, {"target_agreement": None, "noise_scale": -1.0}, "noise_scale: expected a number"),
    (DPORun, {"data": ()}, "data: expected at least one file"),
    (DPORun, {"sample_steps": 0}, "sample_steps: expected a number above 0"),
    (DPORun, {"eval_fraction": 1.5}, "eval_fraction: expected a share"),
    (RewardRun, {"eval_fraction": -0.1}, "eval_fraction: expected a share"),
    (SelectRun, {"prompts": ()}, "prompts: expected at least one file"),
    (SelectRun, {"reward_model": None}, "expected reward_model, reward_function or rewards"),
    (SelectRun, {"reward_function": "m.py:reward_model"}, "got 'reward_model' twice"),
    (SelectRun, {"num_prompts": 0}, "num_prompts: expected a number above 0"),
    (PPORun, {"prompts": ()}, "prompts: expected at least one file"),
    (PPORun, {"best_of_n": 0}, "best_of_n: expected a number above 0"),
    (PPORun, {"rewards": {"reward_model": RewardPart(model="r")}}, "'reward_model' twice"),
    (PPORun, {"rewards": {"a/b": RewardPart(model="r")}}, "names of letters, digits, _ and -"),
    (EvaluateRun, {"best_of_n": 0, "reward_model": "r"}, "best_of_n: expected a number above 0"),
    (EvaluateRun, {"models": {"a": "m", "best-of-4": "n"}, "reward_model": "r", "best_of_n": 4},
     "models: expected no model called best-of-4"),
    (PPORun, {"ptx_coef": 1.0}, "ptx_data: expected text files, because ptx_coef is above 0"),
    (PPORun, {"source_weights": {"a": -1.0}}, "source_weights.a: expected a number of at least 0"),
    (PPORun, {"source_weights": {"a": 0.0}}, "source_weights: expected at least one weight"),
    (PPORun, {"sampling": SamplingConfig(top_k=5)}, "sampling: expected plain sampling"),
    (EvaluateRun, {"labeler": None}, "labeler: expected a labeler or a reward_model"),
    (EvaluateRun, {"reference": "c"}, "models: expected an entry for 'c'"),
    (EvaluateRun, {"pairs": (("a", "d"),)}, "models: expected an entry for 'd'"),
    (EvaluateRun, {"models": {}}, "models: expected at least one file"),
    (EvaluateRun, {"sampling": SamplingConfig(greedy=True)}, "sampling: expected plain sampling"),
])
def test_settings_that_do_not_fit_are_refused(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(cls, **settings)


def test_settings_that_fit_are_accepted():
    assert make(RankRun, target_agreement=None, noise_scale=0.0).noise_scale == 0.0
    assert make(EvaluateRun, sampling=SamplingConfig(greedy=True, logprobs="raw")).reference == "a"
    assert make(PPORun, ptx_coef=1.0, ptx_data=("t.txt",)).ptx_coef == 1.0
