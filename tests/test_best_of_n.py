"""Best-of-n: expected values and KL against enumeration, and the stages that use them."""

import importlib
import io
import itertools
import json
import math

import pytest
import torch

from fastrl import cli
from fastrl.best_of_n import (
    best_of_n_kl,
    best_of_n_mean,
    best_of_n_table,
    kept_samples,
    measured_best_of_n_kl,
)
from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import load_demonstrations, load_encoder, word_tokenizer
from fastrl.errors import ConfigError, ShapeError
from fastrl.evaluation import generate_for
from fastrl.models import load_causal_lm, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm, save_scalar_model
from fastrl.pipeline import run_recipe
from fastrl.report import write_report
from fastrl.reward_settings import BestOfNRun, RewardPart
from fastrl.runs import EvaluateRun, PPORun
from fastrl.stages import run_stage
from fastrl.trainers.common import derive_seed


def test_best_of_n_kl_golden_values(golden):
    assert {n: best_of_n_kl(n) for n in golden.BEST_OF_N_KL} == pytest.approx(
        golden.BEST_OF_N_KL, abs=1e-5)
    assert best_of_n_kl(1) == 0
    with pytest.raises(ConfigError, match="n of at least 1"):
        best_of_n_kl(0)


def enumerated_kl(responses, n):
    """KL(best-of-n || policy) over all n-tuples of responses: [(probability, score), ...]."""
    best = [0.0] * len(responses)
    for draw in itertools.product(range(len(responses)), repeat=n):
        chosen = max(draw, key=lambda i: responses[i][1])  # the first of the best
        best[chosen] += math.prod(responses[i][0] for i in draw)
    return sum(b * math.log(b / p) for b, (p, _) in zip(best, responses, strict=True))


@pytest.mark.parametrize("counts, scores", [
    ((4, 4), (0.0, 1.0)),            # right or wrong
    ((6, 2), (0.0, 1.0)),
    ((2, 3, 3), (0.0, 1.0, 2.0)),    # three responses, three scores
    ((2, 3, 3), (1.0, 0.0, 1.0)),    # two responses of one score: the tie is split as drawn
])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_kl_where_scores_tie_is_the_enumerated_one(counts, scores, n):
    total = sum(counts)
    samples = [s for count, s in zip(counts, scores, strict=True) for _ in range(count)]
    expected = enumerated_kl([(c / total, s) for c, s in zip(counts, scores, strict=True)], n)
    assert float(measured_best_of_n_kl(torch.tensor([samples]), n)) == pytest.approx(expected)
    assert expected <= best_of_n_kl(n) + 1e-12


def test_kl_of_distinct_scores_is_the_formula_and_part_of_it_where_some_tie():
    distinct = torch.arange(16.0)[None]
    for n in (1, 2, 7, 16):
        assert float(measured_best_of_n_kl(distinct, n)) == pytest.approx(best_of_n_kl(n))
    some = distinct.clone()
    some[0, :8] = 0.0
    assert 0 < float(measured_best_of_n_kl(some, 4)) < best_of_n_kl(4)
    assert measured_best_of_n_kl(torch.ones(3, 5), 5).tolist() == [0.0, 0.0, 0.0]


def test_the_mean_of_the_best_is_that_over_all_subsets():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.5, 0.3], [1.0, 1.0, 1.0, 4.0, -2.0]])
    gold = torch.tensor([[5.0, 4.0, 3.0, 2.0, 5.0], [0.0, 0.0, 0.0, 1.0, 9.0]])
    for n in range(1, 6):
        subsets = list(itertools.combinations(range(5), n))
        best = [[max(row[i] for i in subset) for subset in subsets] for row in scores.tolist()]
        expected = sum(map(sum, best)) / (2 * len(subsets))
        assert best_of_n_mean(scores, n) == pytest.approx(expected)
        golds = [g[max(subset, key=lambda i: row[i])] for row, g
                 in zip(scores.tolist(), gold.tolist(), strict=True) for subset in subsets]
        assert best_of_n_mean(scores, n, gold) == pytest.approx(sum(golds) / len(golds))
    assert best_of_n_mean(scores, 1) == pytest.approx(float(scores.mean()))


def test_the_table_goes_up_in_powers_of_two():
    scores = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0, 0.0]])
    rows = best_of_n_table(scores, -scores)
    assert [row["n"] for row in rows] == [1, 2, 4, 6]
    assert rows[-1] == {"n": 6, "score_mean": 5.0, "gold_mean": -5.0,
                        "kl_bound": best_of_n_kl(6), "kl": pytest.approx(best_of_n_kl(6))}
    assert "gold_mean" not in best_of_n_table(scores)[0]


def test_samples_that_are_kept():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -1.0, 0.5, 0.0]])
    allowed = torch.tensor([[True, False, True, True], [True, True, False, True]])
    assert kept_samples(scores, 1) == [[1], [2]]
    assert kept_samples(scores, 4, threshold=2.0) == [[1, 2, 3], []]
    assert kept_samples(scores, 2, allowed=allowed) == [[2, 3], [0, 3]]
    assert kept_samples(scores, 1, 0.5, allowed) == [[2], []]


@pytest.mark.parametrize("scores, n, error", [
    (torch.zeros(2, 3), 4, ShapeError), (torch.zeros(3), 1, ShapeError),
    (torch.zeros(0, 3), 1, ShapeError), (torch.zeros(2, 3), 0, ConfigError)])
def test_what_cannot_be_the_best_of_n(scores, n, error):
    for function in (measured_best_of_n_kl, best_of_n_mean):
        with pytest.raises(error, match="best of n: expected"):
            function(scores, n)
    with pytest.raises(ShapeError, match="values of the scores' shape"):
        best_of_n_mean(torch.zeros(2, 3), 1, torch.zeros(2, 4))


WORDS = "the fox owl bear eats likes berries honey mice . ?".split()
MINE = """
def honey(prompts, completions):
    return [float(text.split().count("honey")) for text in completions]

def berries(prompts, completions):
    return [float("berries" in text) for text in completions]
"""


@pytest.fixture
def place(tmp_path):
    """A language model that stops now and then, a reward model, prompts, and functions."""
    encoder = word_tokenizer(WORDS, tmp_path / "tokenizer")
    shape = decoder_config("llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                           num_layers=1, num_heads=2, max_positions=64,
                           eos_token_ids=encoder.eos_token_ids)
    save_causal_lm(new_decoder(shape, seed=0), tmp_path / "model", tokenizer_from=encoder.path)
    save_scalar_model(scalar_from_causal(new_decoder(shape, seed=1), 1), tmp_path / "judge",
                      tokenizer_from=encoder.path)
    (tmp_path / "prompts.jsonl").write_text("".join(
        json.dumps({"prompt": f"the {w}", "id": i}) + "\n" for i, w in enumerate(WORDS[:6])))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def settings(place, **changes):
    return BestOfNRun(**{
        "model_name_or_path": str(place / "model"), "prompts": (str(place / "prompts.jsonl"),),
        "output_dir": str(place / "out"), "reward_function": f"{place}/mine.py:honey",
        "num_samples_per_prompt": 8, "sampling": SamplingConfig(max_new_tokens=24), **changes})


def run(kind, config):
    text = io.StringIO()
    folder = run_stage(kind, config, console=Console(file=text))
    return folder, text.getvalue()


def rows(folder):
    return [json.loads(line) for line in
            (folder / "demonstrations.jsonl").read_text().splitlines()]


def honeys(row):
    return row["completion"].split().count("honey")


def test_a_command_that_keeps_nothing_names_no_file(place, capsys):
    command = ["best_of_n", "--model_name_or_path", str(place / "model"), "--prompts",
               str(place / "prompts.jsonl"), "--reward_function", f"{place}/mine.py:honey",
               "--num_samples_per_prompt", "2", "--sampling.max_new_tokens", "24"]
    for threshold, is_named in (("-1", True), ("1000", False)):
        folder = place / threshold
        assert cli.main([*command, f"--threshold={threshold}", "--output_dir", str(folder)]) == 0
        printed = capsys.readouterr().out
        assert (folder / "demonstrations.jsonl").exists() == is_named
        assert (f"data    {folder / 'demonstrations.jsonl'}" in printed) == is_named
        assert f"report  {folder / 'report.html'}" in printed


def test_the_best_completion_of_each_prompt_is_a_demonstration(place):
    folder, printed = run("best_of_n", settings(
        place, gold_rewards={"b": RewardPart(function=f"{place}/mine.py:berries")}))
    kept = rows(folder)
    result = json.loads((folder / "best_of_n.json").read_text())
    assert result["num_kept"] == len(kept) > 2 and result["num_prompts"] == 6
    assert result["num_prompts_without"] == 6 - len(kept)
    encoder, model = load_encoder(place / "model"), load_causal_lm(place / "model")
    for row in kept:  # the score is the completion's own, and the row's fields are there
        assert row["score"] == honeys(row) and row["prompt"] == f"the {WORDS[row['id']]}"
    (first, *_), last = result["table"], result["table"][-1]
    assert last["n"] == 8 and last["score_mean"] > first["score_mean"] and "gold_mean" in last
    assert last["kl"] < last["kl_bound"] == pytest.approx(best_of_n_kl(8))  # counts tie
    examples, _ = load_demonstrations(str(folder / "demonstrations.jsonl"), encoder, 64)
    assert len(examples) == len(kept)
    assert all(example.token_ids[-1] in encoder.eos_token_ids for example in examples)
    assert max(max(example.token_ids) for example in examples) < model.spec.vocab_size
    page = write_report(folder).read_text()
    assert "best of n" in page and "KL measured" in page and "mean gold score" in page
    assert f"{len(kept)} completions kept for 6 prompts" in printed


def test_a_threshold_keeps_all_that_are_good_enough(place):
    folder, _ = run("best_of_n", settings(place, num_kept_per_prompt=8, threshold=1.0,
                                          keep_unfinished=True))
    kept = rows(folder)
    assert min(row["score"] for row in kept) >= 1
    by_prompt = {i: [row["score"] for row in kept if row["id"] == i] for i in range(6)}
    assert max(map(len, by_prompt.values())) > 1
    assert all(scores == sorted(scores, reverse=True) for scores in by_prompt.values())
    fewer, _ = run("best_of_n", settings(place, num_kept_per_prompt=8, threshold=1.0,
                                         output_dir=str(place / "fewer")))
    assert 0 < len(rows(fewer)) < len(kept)  # without those that did not stop


def test_nothing_good_enough_is_said(place):
    folder, printed = run("best_of_n", settings(place, threshold=1e6))
    assert not (folder / "demonstrations.jsonl").exists()
    assert "no completion was good enough; lower threshold" in printed
    assert json.loads((folder / "best_of_n.json").read_text())["num_prompts_without"] == 6


def test_rounds_of_prompts_change_nothing(place, monkeypatch):
    whole, _ = run("best_of_n", settings(place, reward_function=None,
                                         reward_model=str(place / "judge")))
    module = importlib.import_module("fastrl.stages.best_of_n")  # not the function of that name
    monkeypatch.setattr(module, "_SAMPLES_PER_ROUND", 16)
    parts, _ = run("best_of_n", settings(place, reward_function=None, output_dir=str(place / "2"),
                                         reward_model=str(place / "judge")))
    assert [row["completion"] for row in rows(whole)] == [row["completion"] for row in rows(parts)]


@pytest.mark.parametrize("changes, message", [
    ({"prompts": ()}, "prompts: expected at least one file"),
    ({"num_samples_per_prompt": 0}, "num_samples_per_prompt: expected a number above 0"),
    ({"num_kept_per_prompt": 9}, r"num_kept_per_prompt: expected at most num_samples_per_prompt"),
    ({"num_prompts": 0}, "num_prompts: expected a number above 0"),
    ({"sampling": SamplingConfig(greedy=True)}, "greedy completions of a prompt are all the same"),
    ({"reward_function": None}, "expected reward_model, reward_function or rewards, got none"),
    ({"reward_function": "gsm9k"}, "did you mean 'gsm8k'"),
    ({"gold_rewards": {"a": RewardPart(function="gsm9k")}}, "did you mean 'gsm8k'"),
])
def test_wrong_settings_of_best_of_n_are_refused(place, changes, message):
    with pytest.raises(ConfigError, match=message):
        run("best_of_n", settings(place, **changes))
    assert not (place / "out").exists()


def test_an_evaluation_has_the_best_of_n_as_one_of_its_models(place):
    config = EvaluateRun(
        models={"start": str(place / "model")}, reference="start", best_of_n=8,
        pairs=(("best-of-8", "start"),), prompts=(str(place / "prompts.jsonl"),),
        reward_function=f"{place}/mine.py:honey", output_dir=str(place / "out"), num_table_rows=2,
        sampling=SamplingConfig(max_new_tokens=12))
    folder, printed = run("evaluate", config)
    result = json.loads((folder / "evaluation.json").read_text())
    best, start = result["models"]["best-of-8"], result["models"]["start"]
    assert best["score_mean"] > start["score_mean"] and result["win_rates"][0]["rate"] > 0.5
    assert result["best_of_n"] == {"name": "best-of-8", "n": 8, "kl_bound": best_of_n_kl(8)}
    assert 0.1 < best["kl"]["k1"] < best_of_n_kl(8) and abs(start["kl"]["k1"]) < 1e-4
    assert result["judge"] == "honey" and "best-of-8" in result["samples"][0]["responses"]
    assert "best-of-8" in write_report(folder).read_text() and "best-of-8" in printed
    with pytest.raises(ConfigError, match="models: expected an entry for 'best-of-4'"):
        EvaluateRun(**{**{name: getattr(config, name) for name in config.__dataclass_fields__},
                       "pairs": (("best-of-4", "start"),)})
    with pytest.raises(ConfigError, match="a reward to choose the best of n with"):
        EvaluateRun(**{**{name: getattr(config, name) for name in config.__dataclass_fields__},
                       "reward_function": None, "labeler": "lexicon"})


def test_every_report_of_ppo_has_the_baseline_of_its_start(place):
    config = PPORun(
        model_name_or_path=str(place / "model"), prompts=(str(place / "prompts.jsonl"),),
        reward_function=f"{place}/mine.py:honey", critic_init="policy", best_of_n=4,
        eval_prompts=(str(place / "prompts.jsonl"),), output_dir=str(place / "out"), eval_steps=2,
        num_iterations=2, rollout_batch_size=4, minibatch_size=4, missing_eos_penalty=None,
        parking="on", sampling=SamplingConfig(max_new_tokens=12))
    folder, _ = run("ppo", config)
    result = json.loads((folder / "best_of_n.json").read_text())
    assert [row["n"] for row in result["table"]] == [1, 2, 4] and result["num_prompts"] == 6
    # The policy at its start, not the trained one: its own samples score the same.
    encoder, model = load_encoder(place / "model"), load_causal_lm(place / "model")
    prompts = [encoder.encode_prompt(f"the {w}") for w in WORDS[:6]]
    rollout = generate_for(model, prompts, config.sampling, num_samples_per_prompt=4,
                           seed=derive_seed(config.seed, "best_of_n"))
    counts = [encoder.decode(rollout.response(i)).split().count("honey") for i in range(24)]
    assert result["table"][0]["score_mean"] == pytest.approx(sum(counts) / 24)
    page = write_report(folder).read_text()
    assert "out: best of n" in page and "the model that out starts from" in page
    without, _ = run("ppo", PPORun(**{
        **{name: getattr(config, name) for name in config.__dataclass_fields__},
        "best_of_n": None, "output_dir": str(place / "without")}))
    assert not (without / "best_of_n.json").exists()
    assert (without / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


RECIPE = """
name: rejection
stages:
  - name: best
    kind: best_of_n
    model_name_or_path: model
    reward_function: mine.py:honey
    prompts: [prompts.jsonl]
    num_samples_per_prompt: 6
    sampling: {max_new_tokens: 24}
  - name: sft
    kind: sft
    model_name_or_path: model
    data: ["@best/demonstrations.jsonl"]
    max_steps: 2
    batch_size: 2
    select_by: last
"""


def test_rejection_sampling_is_two_stages_of_a_recipe(place):
    (place / "r.yaml").write_text(RECIPE)
    report = run_recipe(place / "r.yaml", data_root=place, output_dir=place / "run",
                        console=Console(file=io.StringIO()))
    assert (place / "run/sft/model/config.json").exists() and "best of n" in report.read_text()
    (place / "r.yaml").write_text(RECIPE.replace("@best/demonstrations", "@best/demos"))
    with pytest.raises(ConfigError, match="stage 'best' makes: '@best/demonstrations.jsonl'"):
        run_recipe(place / "r.yaml", data_root=place, output_dir=place / "run2",
                   console=Console(file=io.StringIO()))
