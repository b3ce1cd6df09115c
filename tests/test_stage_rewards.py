"""Stages that are scored by functions and by several rewards, from names to a finished folder."""

import io
import json

import pytest

from fastrl.cli import main
from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import word_tokenizer
from fastrl.errors import ConfigError, DataError, RewardError
from fastrl.models import load_causal_lm, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm, save_scalar_model
from fastrl.pipeline import run_recipe
from fastrl.recipe import load_recipe, resolve_stage
from fastrl.report import write_report
from fastrl.reward_settings import RewardPart, WatchConfig
from fastrl.runs import PPORun
from fastrl.stages import run_stage

WORDS = "the fox owl bear eats likes berries honey mice . ?".split()
MINE = """
calls = []

def berries(prompts, completions, wanted):
    calls.append(prompts)
    assert all(w is not None for w in wanted)
    return [float(w in text) for w, text in zip(wanted, completions)]

def fox(prompts, completions):
    return [float(text.count("fox")) for text in completions]

def breaks_later(prompts, completions):
    calls.append(prompts)
    if len(calls) > 2:
        raise SystemExit("out of answers")
    return [0.0] * len(completions)

def nan_later(prompts, completions):
    calls.append(prompts)
    return [0.0 if len(calls) < 3 else float("nan")] * len(completions)
"""


@pytest.fixture
def place(tmp_path):
    """A language model, two reward models, prompts of two sources and a file of functions."""
    encoder = word_tokenizer(WORDS, tmp_path / "tokenizer")
    shape = decoder_config("llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                           num_layers=1, num_heads=2, max_positions=64,
                           eos_token_ids=encoder.eos_token_ids)
    save_causal_lm(new_decoder(shape, seed=0), tmp_path / "model", tokenizer_from=encoder.path)
    for seed, name in enumerate(("judge", "second"), start=1):
        save_scalar_model(scalar_from_causal(new_decoder(shape, seed=seed), seed),
                          tmp_path / name, tokenizer_from=encoder.path)
    rows = [{"prompt": f"the {w}", "source": "ab"[i % 2],
             **({"wanted": "berries"} if i % 2 == 0 else {})} for i, w in enumerate(WORDS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "eval.jsonl").write_text('{"prompt": "owl likes", "source": "b"}\n')
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def settings(place, **changes):
    return PPORun(**{
        "model_name_or_path": str(place / "model"), "output_dir": str(place / "out"),
        "prompts": (str(place / "prompts.jsonl"),), "eval_prompts": (str(place / "eval.jsonl"),),
        "num_iterations": 2, "rollout_batch_size": 8, "minibatch_size": 4, "eval_steps": 1,
        "critic_init": "policy", "sampling": SamplingConfig(max_new_tokens=4), **changes})


def run(config):
    return run_stage("ppo", config, console=Console(file=io.StringIO()))


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ppo_of_a_function_alone_from_the_command_line(place, capsys):
    (place / "all.jsonl").write_text('{"prompt": "the fox", "wanted": "honey"}\n')
    code = main(["ppo", "--model_name_or_path", str(place / "model"), "--critic_init", "policy",
                 "--reward_function", f"{place}/mine.py:berries", "--eval_steps", "null",
                 "--prompts", str(place / "all.jsonl"), "--eval_fraction", "0",
                 "--num_iterations", "1", "--rollout_batch_size", "4", "--minibatch_size", "4",
                 "--sampling.max_new_tokens", "4", "--missing_eos_penalty", "null",
                 "--output_dir", str(place / "out"), "--quiet"])
    assert code == 0, capsys.readouterr().err
    assert 0 <= lines(place / "out")[-1]["reward/score_mean"] <= 1
    inputs = json.loads((place / "out/run.json").read_text())["lineage"]["inputs"]
    assert f"{place}/mine.py" in inputs  # another reward is another run


def test_models_and_functions_with_weights_by_source(place):
    folder = run(settings(
        place, reward_model=str(place / "judge"), critic_init="reward", parking="on", rewards={
            "second": RewardPart(model=str(place / "second"), weight=0.5),
            "wanted": RewardPart(function=f"{place}/mine.py:berries", weight=0.0,
                                 source_weights={"a": 2.0}),
            "lexicon": RewardPart(labeler="lexicon", weight=0.1),
            "short": RewardPart(function="length", arguments={"target": 10}, weight=0.2)}))
    seen = {name for line in lines(folder) for name in line}
    names = {"reward_model", "second", "lexicon", "short"}
    assert {f"eval/reward_part_{name}_mean" for name in names} <= seen
    assert {f"reward/part_{name}_mean" for name in names | {"wanted"}} <= seen
    assert "eval/reward_part_wanted_mean" not in seen  # no held-out prompt of that source
    assert "Mean score of one reward of a weighted sum" in write_report(folder).read_text()


def test_gold_rewards_are_watched_and_never_optimised(place):
    watched = {"gold": RewardPart(model=str(place / "second")),
               "words": RewardPart(labeler="lexicon", weight=0.5)}
    common = {"reward_function": f"{place}/mine.py:fox", "parking": "on", "learning_rate": 0.05,
              "eval_prompts": (str(place / "prompts.jsonl"),)}
    folder = run(settings(place, **common, gold_rewards=watched, watch=WatchConfig(max_kl=1e-9)))
    rows = [json.loads(line) for line in (folder / "watch.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and "kl_start_policy" in rows[2]["alarms"]
    assert lines(folder)[-1]["watch/gold_mean"] == rows[2]["gold"]
    table = json.loads((folder / "best_of_n.json").read_text())["table"]
    assert "gold_mean" in table[0]
    plain = run(settings(place, **common, output_dir=str(place / "plain")))
    assert lines(plain)[-1]["reward/score_mean"] == lines(folder)[-1]["reward/score_mean"]
    page = write_report(folder).read_text()
    assert "Reward-hacking watch" in page and "gold score, best of n" in page
    with pytest.raises(ConfigError, match="eval_steps: expected a number, because gold_rewards"):
        settings(place, reward_function="gsm8k", gold_rewards=watched, eval_steps=None)


@pytest.mark.parametrize("name, message", [
    ("breaks_later", "SystemExit: out of answers, from .*"), ("nan_later", "got nan; ")])
def test_a_function_that_ends_a_run_leaves_the_policy_so_far(place, name, message):
    config = settings(place, reward_function=f"{place}/mine.py:{name}", eval_steps=None,
                      num_iterations=5, best_of_n=None)
    with pytest.raises(RewardError, match=f"function {name}: .*{message}prompt .*The policy after "
                                          "2 iterations is in .*last_model"):
        run(config)
    saved = load_causal_lm(place / "out/last_model").state_dict()
    start = load_causal_lm(place / "model").state_dict()
    assert any((saved[name] != start[name]).any() for name in start)
    assert not (place / "out/finished.json").exists()


@pytest.mark.parametrize("changes, error, message", [
    ({}, ConfigError, "expected reward_model, reward_function or rewards, got none"),
    ({"reward_function": "gsm8k", "critic_init": "reward"}, ConfigError,
     "critic_init: expected 'policy', because no reward is a reward model"),
    ({"reward_function": "not/mine.py:berries"}, DataError, "not/mine.py: expected a file"),
    ({"reward_function": "{place}/mine.py:berry"}, ConfigError, "did you mean 'berries'"),
    ({"reward_function": "gsm8k"}, RewardError,
     "gsm8k_reward: .*prompts whose rows have an answer.*prompt 'owl"),
    ({"reward_function": "ifeval"}, RewardError,
     "ifeval_reward: expected a column 'instruction_id_list'"),
    ({"rewards": {"x": RewardPart(labeler="lexikon")}}, ConfigError, "labeler.*'lexicon'"),
    ({"rewards": {"x": RewardPart(function="gsm8k", source_weights={"c": 1.0})}}, ConfigError,
     "rewards.x.source_weights: expected sources of the prompts .'a', 'b'"),
])
def test_wrong_rewards_stop_a_stage(place, changes, error, message):
    changes = {name: value.format(place=place) if isinstance(value, str) else value
               for name, value in changes.items()}
    with pytest.raises(error, match=message):
        run(settings(place, **changes))


RECIPE = """
name: mine
stages:
  - name: ppo
    kind: ppo
    model_name_or_path: model
    reward_function: mine.py:berries
    critic_init: policy
    prompts: [prompts.jsonl]
    rewards:
      second: {model: second, weight: 0.5}
      other: {function: "mine.py:breaks_later"}
      short: {function: length, arguments: {target: 10}}
"""


def test_a_recipe_finds_files_of_functions_in_the_data_root(place):
    path = place / "mine.yaml"
    path.write_text(RECIPE)
    (stage,) = load_recipe(path, ["ppo.rewards.short.weight=2"]).stages
    assert set(stage.references) == {"model", "prompts.jsonl", "second", "mine.py"}
    resolved = resolve_stage(stage, place / "run", place)
    assert resolved.reward_function == f"{place}/mine.py:berries"
    assert resolved.rewards == {
        "second": RewardPart(model=str(place / "second"), weight=0.5),
        "other": RewardPart(function=f"{place}/mine.py:breaks_later"),
        "short": RewardPart(function="length", arguments={"target": 10}, weight=2.0)}


@pytest.mark.parametrize("change, error, message", [
    ("ppo.reward_function=mine.py:berry", ConfigError, "did you mean 'berries'"),
    ("ppo.reward_function=other.py:berries", DataError, "reward_function: .*nothing at .*other.py"),
    ("ppo.rewards.second.model=third", DataError, "reward_model: .*nothing at .*third"),
    ("ppo.rewards.short.function=lenght", ConfigError, "did you mean 'length'"),
    ("ppo.rewards.short.arguments={}", ConfigError, "length: expected arguments"),
    ("ppo.rewards.short.wait=3", ConfigError, "unknown.*'wait'.*'weight'"),
])
def test_a_recipe_is_checked_before_its_first_stage(place, change, error, message):
    path = place / "mine.yaml"
    path.write_text(RECIPE)
    with pytest.raises(error, match=message):
        run_recipe(path, data_root=place, output_dir=place / "run", overrides=[change],
                   console=Console(file=io.StringIO()))
    assert not (place / "run").exists()
