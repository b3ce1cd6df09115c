"""Rewards by name, and weighted sums of several, from settings to scores."""

import pytest
import torch

from fastrl.errors import ConfigError, DataError, RewardError
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.models.decoder import DecoderConfig, new_decoder
from fastrl.parsing import parse_config
from fastrl.reward_settings import RewardPart, join_parts
from fastrl.rewards import (
    FunctionScorer,
    RewardModelScorer,
    WeightedScorer,
    WeightedScores,
    check_function,
    find_function,
    reward_models,
    score_metrics,
)
from fastrl.types import Prompt, Rollout

EOS = 1
PROMPTS = [Prompt((2, 3), "sum", "maths", {"answer": "7"}), Prompt((4,), "tale", "stories"),
           Prompt((5,), "poem", "poems")]


class Codec:
    """Token 1 ends a text, token 2 is 'a', token 3 is 'b' and so on."""

    eos_token_ids = (EOS,)

    def decode(self, ids):
        return "".join(chr(ord("a") + t - 2) for t in ids)


def make_rollout(prompts, responses):
    """A rollout of responses of equal length."""
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    ids = torch.tensor(responses)
    return Rollout(
        token_ids=torch.tensor([t for s in sequences for t in s]),
        cu_seqlens=torch.tensor([0, *map(len, sequences)]).cumsum(0),
        prompt_lens=torch.tensor([len(p) for p in prompts]), response_ids=ids,
        response_mask=torch.ones_like(ids, dtype=torch.bool),
        rollout_logprobs=torch.zeros(ids.shape), entropy=torch.zeros(ids.shape),
        finish_reasons=("stop",) * len(ids))


ROLLOUT = make_rollout([p.token_ids for p in PROMPTS], [[2, 2], [3, 4], [2, 4]])


def count(letter):
    def counted(prompts, completions):
        return [float(text.count(letter)) for text in completions]

    return FunctionScorer(counted, Codec())


def reward_model(seed):
    return RewardModelScorer(scalar_from_causal(new_decoder(DecoderConfig(
        family="llama", vocab_size=11, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, rotary_dim=8, intermediate_size=24, max_positions=32), seed=seed), seed=seed))


def term(name, scorer, weight=1.0, **source_weights):
    return WeightedScores(name=name, scorer=scorer, weight=weight,
                          source_weights=source_weights or None)


def test_a_weighted_sum_of_functions_and_a_reward_model():
    model = reward_model(0)
    scorer = WeightedScorer([term("a", count("a"), 2.0), term("c", count("c"), -0.5),
                             term("model", model, 3.0)])
    counted = torch.tensor([4.0, -0.5, 2.0 - 0.5])
    torch.testing.assert_close(scorer(ROLLOUT), counted + 3 * model(ROLLOUT))
    assert score_metrics(scorer) == {
        "reward/part_a_mean": 1.0, "reward/part_c_mean": pytest.approx(2 / 3),
        "reward/part_model_mean": pytest.approx(float(model(ROLLOUT).mean()))}
    assert score_metrics(scorer, "eval/reward_").keys() == {
        "eval/reward_part_a_mean", "eval/reward_part_c_mean", "eval/reward_part_model_mean"}
    assert score_metrics(model) == {}


def test_sources_have_weights_of_their_own_and_zero_is_not_asked():
    seen = []

    def maths(prompts, completions, answer):
        seen.append((prompts, answer))
        return [1.0] * len(prompts)

    scorer = WeightedScorer(
        [term("answer", FunctionScorer(maths, Codec(), PROMPTS), 0.0, maths=5.0),
         term("a", count("a"), 1.0, stories=10.0, poems=-1.0)], PROMPTS)
    assert scorer(ROLLOUT).tolist() == [5.0 + 2.0, 0.0, -1.0]
    assert seen == [(["sum"], ["7"])]
    assert scorer.means == {"answer": 1.0, "a": pytest.approx(1.0)}
    without = ROLLOUT.select([1, 2])
    assert scorer(without).tolist() == [0.0, -1.0]
    assert scorer.means.keys() == {"a"}  # nobody was asked for an answer


@pytest.mark.parametrize("terms, message", [
    ([], "at least one term"),
    ([term("a", count("a")), term("a", count("b"))], "distinct names, got .'a', 'a'"),
    ([term("a", count("a"), 1.0, math=2.0)],
     r"rewards.a.source_weights: .*\('maths', 'poems', 'stories'\), got 'math'"),
])
def test_sums_that_cannot_be_meant_are_refused(terms, message):
    with pytest.raises(ConfigError, match=message):
        WeightedScorer(terms, PROMPTS)


def test_equal_prompts_of_sources_with_other_weights_are_refused():
    twice = [*PROMPTS, Prompt((4,), "tale", "poems")]
    with pytest.raises(DataError, match="'tale' with 'stories' and 'poems'; drop one"):
        WeightedScorer([term("a", count("a"), 1.0, poems=2.0)], twice)
    WeightedScorer([term("a", count("a"), 1.0, maths=2.0)], twice)  # these two weigh the same


def test_reward_models_of_scorers_are_listed_once():
    first, second, gold = reward_model(0), reward_model(1), reward_model(2)
    both = WeightedScorer([term("x", first), term("a", count("a")), term("y", second)])
    assert reward_models(both, None, gold) == {
        "reward model": first.model, "reward model 2": second.model, "reward model 3": gold.model}
    assert reward_models(first, first) == {"reward model": first.model}
    assert reward_models(count("a"), None) == {}


def file(tmp_path, text, name="mine.py"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


GOOD = """
from neighbour import SCALE
raise_on_sight = False

def length(prompts, completions, **columns):
    return [SCALE * len(text) for text in completions]

alias = length
"""


def test_a_function_of_a_file_is_found_and_may_import_its_neighbours(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    file(tmp_path, "SCALE = 3.0", "neighbour.py")
    path = file(tmp_path, GOOD)
    assert find_function(f"{path}:length")(["p"], ["four"]) == [12.0]
    assert find_function(f"{path}:alias")(["p"], ["ab"]) == [6.0]


def test_names_of_fastrl_verify():
    assert find_function("gsm8k")(["p"], ["#### 7"], answer=["7"]) == [1.0]
    assert find_function("ifeval")(
        ["p"], ["no"], instruction_id_list=[["punctuation:no_comma"]], kwargs=[[{}]]) == [1.0]
    assert find_function("length", {"target": 4})(["p"], ["ab"]) == [-0.5]
    assert find_function("format", {"pattern": "a+"})(["p"], ["aaa"]) == [1.0]


@pytest.mark.parametrize("name, arguments, message", [
    ("gsm9k", {}, "reward_function: .*'gsm9k'.*did you mean 'gsm8k'.*path/to/file.py:name"),
    ("length", {}, "length: expected arguments .*target.*missing a required argument: 'target'"),
    ("length", {"goal": 3}, "length: expected arguments .*target.*correct arguments"),
    ("length", {"target": "x"}, "length: expected arguments .*correct arguments"),
    ("length", {"target": 0}, "length_reward: expected a target of at least 1"),
    ("format", {"pattern": "("}, "format_reward: expected a regular expression"),
    ("gsm8k", {"target": 3}, "gsm8k: expected no arguments, got .'target'"),
    ("no/such.py:f", {}, "expected a Python file, found none at no/such.py"),
    ("no/such.py", {}, "expected path/to/file.py:name, got 'no/such.py', which names no function"),
    ("no/such.py:", {}, "expected path/to/file.py:name, got 'no/such.py:'"),
])
def test_wrong_names_and_arguments_are_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_function(name, arguments)


def test_a_file_is_checked_without_being_executed(tmp_path):
    path = file(tmp_path, "raise SystemExit('executed')\ndef score(prompts, completions): ...")
    check_function(f"{path}:score")
    with pytest.raises(ConfigError, match="to define 'scores'.*did you mean 'score'"):
        check_function(f"{path}:scores")
    with pytest.raises(ConfigError, match="expected no arguments, got .'a'"):
        check_function(f"{path}:score", {"a": 1})
    with pytest.raises(RewardError, match="function score: .*SystemExit: executed, while"):
        find_function(f"{path}:score")
    broken = file(tmp_path, "def score(:", "broken.py")
    with pytest.raises(ConfigError, match="expected Python in .*broken.py, got .*line 1"):
        check_function(f"{broken}:score")
    with pytest.raises(ConfigError, match="to define 'hidden'"):  # only inside a function
        find_function(file(tmp_path, "def f():\n    hidden = 1", "inner.py") + ":hidden")


def test_parts_come_from_plain_values_and_join_the_shorthands():
    values = {"model": "m", "weight": -2, "source_weights": {"a": 1}, "timeout_s": None}
    part = parse_config(RewardPart, values, "rewards.x")
    assert part == RewardPart(model="m", weight=-2.0, source_weights={"a": 1.0}, timeout_s=None)
    length = parse_config(RewardPart, {"function": "length", "arguments": {"target": 9}}, "x")
    assert length.arguments == {"target": 9}
    assert join_parts("r", "dir/f.py:mine", {"x": part}) == {
        "reward_model": RewardPart(model="r"), "mine": RewardPart(function="dir/f.py:mine"),
        "x": part}
    assert join_parts(None, None, None) == {}


@pytest.mark.parametrize("values, message", [
    ({}, "exactly one of model, function and labeler, got 'none of them'"),
    ({"model": "m", "function": "gsm8k"}, r"exactly one of .*got \['model', 'function'\]"),
    ({"model": "m", "arguments": {"target": 3}}, "arguments: expected none without a function"),
    ({"model": "m", "weight": 0}, "weight: expected a weight other than 0"),
    ({"model": "m", "weight": 0, "source_weights": {"a": 0}}, "weight: expected a weight other"),
    ({"function": "gsm8k", "timeout_s": 0}, "timeout_s: expected seconds above 0, or null"),
    ({"function": "gsm8k", "weigth": 1}, "unknown.*'weigth'.*'weight'"),
])
def test_settings_of_a_part_that_cannot_be_meant_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(RewardPart, values, "rewards.x")


def test_names_are_distinct_and_can_be_part_of_a_metrics_name():
    with pytest.raises(ConfigError, match="distinct names, got 'gsm8k' twice"):
        join_parts(None, "gsm8k", {"gsm8k": RewardPart(model="m")})
    with pytest.raises(ConfigError, match="names of letters, digits, _ and -, got 'a b'"):
        join_parts(None, None, {"a b": RewardPart(model="m")})
