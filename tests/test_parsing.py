"""Plain values into config dataclasses."""

import pytest

from fastrl.config import PPOConfig, SamplingConfig, SFTConfig, to_dict
from fastrl.errors import ConfigError
from fastrl.parsing import parse_config
from fastrl.runs import EvaluateRun, PPORun, RankRun, SFTRun

PPO = {"model_name_or_path": "m", "output_dir": "o", "prompts": ["p.jsonl"], "reward_model": "r"}


def test_values_arrive_with_the_types_of_the_fields():
    run = parse_config(PPORun, {
        **PPO, "learning_rate": 1, "value_clip_range": None, "source_weights": {"a": 1, "b": 0.5},
        "sampling": {"max_new_tokens": 64, "stop_token_ids": [1]}}, "recipe, stage 'ppo'")
    assert run.prompts == ("p.jsonl",)
    assert run.learning_rate == 1.0 and isinstance(run.learning_rate, float)
    assert run.value_clip_range is None
    assert run.sampling.stop_token_ids == (1,)
    assert run.source_weights == {"a": 1.0, "b": 0.5}


def test_pairs_are_tuples_of_two():
    values = {"models": {"a": "x", "b": "y"}, "reference": "a", "prompts": ["p"],
              "output_dir": "o", "labeler": "lexicon", "pairs": [["b", "a"]]}
    assert parse_config(EvaluateRun, values, "here").pairs == (("b", "a"),)
    with pytest.raises(ConfigError, match=r"pairs\[0\]: expected a list of 2 values"):
        parse_config(EvaluateRun, {**values, "pairs": [["b"]]}, "here")


def test_to_dict_and_back():
    config = PPOConfig(num_iterations=3, kl_controller="adaptive")
    assert parse_config(PPOConfig, to_dict(config), "here") == config


@pytest.mark.parametrize("values, message", [
    ({"max_grad_norm": "None"}, "max_grad_norm: expected a value, or null for none, got 'None'"),
    ({"learning_rat": 1e-3}, "recipe: unknown key 'learning_rat'; did you mean 'learning_rate'"),
    ({"sampling": {"temprature": 1.0}}, "recipe: sampling: unknown key 'temprature'; did you mean "
                                        "'temperature'"),
    ({"learning_rate": "fast"}, "recipe: learning_rate: expected a number, got 'fast'"),
    ({"learning_rate": True}, "recipe: learning_rate: expected a number, got True"),
    ({"learning_rate": float("nan")}, "recipe: learning_rate: expected a finite number"),
    ({"num_iterations": True}, "recipe: num_iterations: expected a whole number, got True"),
    ({"num_iterations": 2.0}, "recipe: num_iterations: expected a whole number, got 2.0"),
    ({"num_iterations": None}, "recipe: num_iterations: expected a whole number, got None"),
    ({"whiten_rewards": 1}, "recipe: whiten_rewards: expected true or false, got 1"),
    ({"kl_estimator": "k4"}, "recipe: kl_estimator: expected one of 'k1', 'k2', 'k3', got 'k4'"),
    ({"sampling": 3}, "recipe: sampling: expected settings, one `name: value` per line, got 3"),
    ({"prompts": "p.jsonl"}, r"recipe: prompts: expected a list \[...\], got 'p.jsonl'"),
    ({"prompts": [1]}, r"recipe: prompts\[0\]: expected text, got 1"),
    ({"source_weights": ["a"]}, "recipe: source_weights: expected settings"),
    ({"seed": 2**63}, r"recipe: seed: expected a number between -2\*\*63 and 2\*\*63"),
    ({"learning_rate": 10**400}, r"learning_rate: expected a number between -2\*\*63 and"),
    ({"learning_rate": 10**4000}, "learning_rate: .* got a number of more than 1,200 digits"),
    ({"lam": 2}, "recipe: lam: expected a number from 0 to 1, got 2.0"),
])
def test_a_wrong_value_names_place_expectation_and_value(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(PPORun, {**PPO, **values}, "recipe")


def test_missing_fields_are_named_together():
    with pytest.raises(ConfigError, match="here: missing 'model_name_or_path', 'output_dir'"):
        parse_config(SFTRun, {"data": ["d"]}, "here")


def test_defaults_stay():
    assert parse_config(SFTConfig, {}, "here") == SFTConfig()


def test_nested_settings_left_out_are_of_the_field():
    values = {"model_name_or_path": "m", "prompts": "p", "output_dir": "o",
              "sampling": {"temperature": 0.8}}
    run = parse_config(RankRun, values, "here")
    assert run.sampling == SamplingConfig(temperature=0.8, max_new_tokens=64)
