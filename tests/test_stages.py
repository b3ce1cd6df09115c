"""Single stages: prompts, rankings, selection and evaluation, on a tiny model made here."""

import io
import json
import shutil

import pytest

from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import load_comparisons, load_encoder, train_bpe_tokenizer, word_tokenizer
from fastrl.errors import ConfigError, DataError, ModelError
from fastrl.models import new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm, save_scalar_model
from fastrl.runs import DPORun, EvaluateRun, PPORun, PromptsRun, RankRun, RewardRun, SFTRun
from fastrl.stages import run_stage

WORDS = "once there was a happy sad cat dog who smiled cried and played .".split()


def save_model(folder, encoder, seed=0):
    """A random model with the encoder's tokenizer, and a reward model beside it."""
    model = new_decoder(decoder_config(
        "llama", vocab_size=encoder.max_token_id + 1, hidden_size=16, num_layers=1, num_heads=2,
        max_positions=128, bos_token_id=encoder.bos_token_id,
        eos_token_ids=encoder.eos_token_ids), seed=seed)
    save_causal_lm(model, folder / "model", tokenizer_from=encoder.path)
    save_scalar_model(scalar_from_causal(model, seed), folder / "reward",
                      tokenizer_from=encoder.path)
    return str(folder / "model")


@pytest.fixture
def words(tmp_path):
    """A model of whole words."""
    return save_model(tmp_path, word_tokenizer(WORDS, tmp_path / "tokenizer"))


@pytest.fixture
def stories(shared):
    return str(shared / "models/stories260k")


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(kind, config):
    """Run a stage; return its folder and what was printed."""
    text = io.StringIO()
    return run_stage(kind, config, console=Console(file=text)), text.getvalue()


def test_prompts_are_beginnings_of_the_models_own_samples(stories, tmp_path):
    config = PromptsRun(model_name_or_path=stories, output_dir=str(tmp_path / "out"),
                        num_train=40, num_heldout=10, num_eval=20, min_tokens=5, max_tokens=9)
    folder, _ = run("prompts", config)
    parts = {name: [row["prompt"] for row in read_rows(folder / f"{name}.jsonl")]
             for name in ("train", "heldout", "eval")}
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 40, "heldout": 10, "eval": 20}
    texts = [text for part in parts.values() for text in part]
    assert len(set(texts)) == 70
    assert sum(text.startswith("Once upon a time") for text in texts) > 10
    encoder = load_encoder(stories)
    lengths = [len(encoder.encode_prompt(text)) - 1 for text in texts]
    assert min(lengths) >= 4 and max(lengths) <= 10  # a cut token may be spelled differently
    again, _ = run("prompts", PromptsRun(**{
        name: getattr(config, name) for name in config.__dataclass_fields__
        if name != "output_dir"}, output_dir=str(tmp_path / "again")))
    assert (again / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()


def test_prompts_need_a_beginning_token(words, tmp_path):
    with pytest.raises(DataError, match="a tokenizer with a beginning-of-text token"):
        run("prompts", PromptsRun(model_name_or_path=words, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_prompts_from_files_are_disjoint_and_weighted(words, tmp_path):
    rows = [{"prompt": f"once there was a {animal} . " * (1 + i % 3) + f"cat {i}", "source": animal,
             "id": i} for i in range(60) for animal in ("dog", "cat")]
    rows += rows[:10] + [{"prompt": "and", "source": "dog"}]
    data = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = {"model_name_or_path": words, "data": (data,), "num_train": 20, "num_heldout": 8,
                "num_eval": 12, "min_tokens": 2, "max_tokens": 14}
    folder, printed = run("prompts", PromptsRun(
        **settings, source_weights={"dog": 3.0, "cat": 1.0}, output_dir=str(tmp_path / "out")))
    parts = {name: read_rows(folder / f"{name}.jsonl") for name in ("train", "heldout", "eval")}
    assert {name: [sum(row["source"] == source for row in part) for source in ("dog", "cat")]
            for name, part in parts.items()} == {"train": [15, 5], "heldout": [6, 2],
                                                 "eval": [9, 3]}
    texts = [row["prompt"] for part in parts.values() for row in part]
    assert len(set(texts)) == len(texts) and "and" not in texts
    assert all("id" in row for row in parts["train"])
    assert "too long, dropped" in printed
    with pytest.raises(DataError, match="expected prompts of source 'bird'.* sources: cat, dog"):
        run("prompts", PromptsRun(**settings, source_weights={"bird": 1.0},
                                  output_dir=str(tmp_path / "bird")))


def rank(model, folder, prompts, **settings):
    sampling = SamplingConfig(max_new_tokens=16)
    return RankRun(**{"model_name_or_path": model, "prompts": prompts, "sampling": sampling,
                      "output_dir": str(folder), "num_samples_per_prompt": 4, **settings})


def test_rankings_are_samples_with_ranks_and_a_known_limit(words, tmp_path):
    train = write_rows(tmp_path / "train.jsonl",
                       [{"prompt": f"{a} {b}", "id": a} for a in WORDS for b in WORDS[:4]])
    heldout = write_rows(tmp_path / "heldout.jsonl", [{"prompt": f"{a} a cat"} for a in WORDS])
    folder, printed = run("rank", rank(words, tmp_path / "out", train, heldout_prompts=heldout))
    rows = read_rows(folder / "rankings.jsonl")
    assert rows[0]["prompt"] == "once once" and rows[0]["id"] == "once"
    for row in rows:
        ranks = [c["rank"] for c in row["completions"]]  # blank completions leave gaps
        assert len(set(ranks)) == len(ranks) and set(ranks) <= {0, 1, 2, 3}
        assert all(c["text"].strip() for c in row["completions"])
    labels = json.loads((folder / "labels.json").read_text())
    assert labels["rankings"]["agreement"] == pytest.approx(0.75, abs=1e-9)
    assert 0.5 < labels["heldout"]["bayes_limit"] < 0.8
    assert len(read_rows(folder / "heldout.jsonl")) == labels["heldout"]["num_prompts"]
    assert "agreement 0.750" in printed
    comparisons, _ = load_comparisons(folder / "rankings.jsonl", load_encoder(words), 128)
    assert len(comparisons) == len(rows)


def test_without_noise_ranks_follow_gold(words, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS])
    folder, _ = run("rank", rank(words, tmp_path / "out", prompts, target_agreement=None,
                                 noise_scale=0.0))
    for row in read_rows(folder / "rankings.jsonl"):
        gold = [c["gold"] for c in row["completions"]]
        order = [c["rank"] for c in row["completions"]]
        assert all((gold[i] > gold[j]) == (order[i] < order[j])
                   for i in range(len(gold)) for j in range(len(gold)))


def test_ranked_texts_read_back_as_the_tokens_that_were_sampled(stories, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": "Once upon a time, there was"}] * 8)
    folder, _ = run("rank", rank(stories, tmp_path / "out", prompts))
    encoder = load_encoder(stories)
    comparisons, _ = load_comparisons(folder / "rankings.jsonl", encoder, 128)
    completions = [ids for comparison in comparisons for ids in comparison.completions]
    # Cut off by the limit: 16 tokens, and no end-of-text token behind them. A few texts are
    # spelled in other tokens than they were sampled in.
    assert sum(len(ids) == 16 for ids in completions) >= 0.8 * len(completions)
    assert all(ids[-1] not in encoder.eos_token_ids for ids in completions)
    texts = [c["text"] for row in read_rows(folder / "rankings.jsonl") for c in row["completions"]]
    assert sum(text.startswith(" ") for text in texts) > len(texts) / 2


def evaluate(models, folder, prompts, **settings):
    return EvaluateRun(**{"models": models, "reference": "first", "prompts": (prompts,),
                          "output_dir": str(folder), "labeler": "lexicon",
                          "sampling": SamplingConfig(max_new_tokens=16), **settings})


def test_evaluation_of_a_model_against_itself(words, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS])
    text = write_rows(tmp_path / "t.jsonl", [{"text": " ".join(WORDS)}])
    config = evaluate({"first": words, "second": words}, tmp_path / "out", prompts, text=(text,),
                      window_tokens=8, num_prompts=10, num_table_rows=3,
                      reward_model=str(tmp_path / "reward"))
    folder, printed = run("evaluate", config)
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["num_prompts"] == 10 and result["judge"] == "lexicon"
    (win,) = result["win_rates"]
    assert (win["model"], win["opponent"]) == ("second", "first")
    assert win["low"] < 0.5 < win["high"]
    first, second = result["models"]["first"], result["models"]["second"]
    assert first["kl"]["k1"] == pytest.approx(0, abs=1e-4)
    assert second["kl"]["k1"] == pytest.approx(0, abs=1e-4)
    assert first["lm_loss"] == second["lm_loss"] == pytest.approx(2.9, abs=0.5)  # ln 17 = 2.83
    assert "reward_mean" in first and len(result["samples"]) == 3
    assert "win rates, lexicon, 10 held-out prompts" in printed


def test_sft_selects_by_a_reward_model_that_is_there(words, tmp_path):
    data = write_rows(tmp_path / "d.jsonl",
                      [{"prompt": word, "completion": "a happy cat ."} for word in WORDS])
    folder, _ = run("sft", SFTRun(
        model_name_or_path=words, data=(data,), output_dir=str(tmp_path / "out"), max_steps=3,
        eval_steps=1, batch_size=4, select_by="reward", reward_model=str(tmp_path / "reward"),
        learning_rate=1e-2, num_candidates=3))
    scores = [row["select/score"] for row in read_rows(folder / "metrics.jsonl")
              if "select/score" in row]
    assert len(scores) == 3
    selected = json.loads((folder / "finished.json").read_text())["summary"]["selected_step"]
    assert scores[selected - 1] == max(scores)
    assert not (folder / "candidates").exists()


def test_reward_names_sources_by_file_where_rows_have_none(words, tmp_path):
    rows = [{"prompt": word, "chosen": "a happy cat .", "rejected": "a sad dog ."}
            for word in WORDS]
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    named = write_rows(tmp_path / "named.jsonl", [{**row, "source": "people"} for row in rows])
    folder, _ = run("reward", RewardRun(
        model_name_or_path=words, data=(plain,), eval_data=(named,), eval_fraction=0.2,
        output_dir=str(tmp_path / "out"), max_steps=1))
    report = json.loads((folder / "reward_report.json").read_text())
    assert set(report["by_source"]) == {"plain.jsonl", "people"}
    assert report["by_source"]["plain.jsonl"]["num_pairs"] == 3  # a fifth of 14 prompts


@pytest.mark.parametrize("has_eval_data, num_held_out", [(False, 1), (True, 14)])
def test_a_reward_model_is_always_judged_on_held_out_rankings(words, tmp_path, has_eval_data,
                                                              num_held_out):
    data = write_rows(tmp_path / "data.jsonl", [
        {"prompt": word, "chosen": "a happy cat .", "rejected": "a sad dog ."} for word in WORDS])
    folder, _ = run("reward", RewardRun(
        model_name_or_path=words, data=(data,), eval_data=(data,) if has_eval_data else (),
        output_dir=str(tmp_path / "out"), max_steps=1))
    report = json.loads((folder / "reward_report.json").read_text())
    assert report["overall"]["num_pairs"] == num_held_out  # of 14: a twentieth, or the file alone


def test_dpo_trains_on_ranking_files_and_saves_a_model_that_can_be_loaded(words, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [
        {"prompt": word, "chosen": "a happy cat .", "rejected": "a sad dog ."} for word in WORDS])
    settings = {"model_name_or_path": words, "data": (data,), "batch_size": 7, "num_epochs": 4,
                "learning_rate": 1e-2}
    folder, printed = run("dpo", DPORun(**settings, output_dir=str(tmp_path / "out")))
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "loss/dpo" in row]
    assert rows[0]["loss/dpo"] == pytest.approx(0.693147, abs=1e-5)  # its reference is itself
    assert rows[-1]["reward/accuracy"] == 1.0 and rows[-1]["loss/dpo_eval"] < 0.6
    summary = json.loads((folder / "finished.json").read_text())["summary"]
    assert (summary["rankings"], summary["held_out"], summary["steps"]) == (13, 1, 8)
    folder, _ = run("dpo", DPORun(**{
        **settings, "reference_model": str(folder / "model"), "eval_data": (data,)},
        output_dir=str(tmp_path / "again")))
    first = read_rows(folder / "metrics.jsonl")[0]
    assert first["loss/dpo"] > 0.7  # a reference that already prefers the better completions
    with pytest.raises(ConfigError, match="reference_model: expected none"):
        DPORun(**settings, output_dir="out", reference="none", reference_model=words)


def test_an_output_folder_that_holds_something_is_refused(words, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="output_dir: expected a new or empty folder"):
        run("rank", rank(words, tmp_path / "out", prompts))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_models_that_do_not_fit_are_refused_before_anything_is_written(words, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": word} for word in WORDS])

    def ppo(**settings):
        return PPORun(**{"model_name_or_path": words, "prompts": (prompts,), "num_iterations": 1,
                         "rollout_batch_size": 2, "minibatch_size": 2,
                         "reward_model": str(tmp_path / "reward"),
                         "output_dir": str(tmp_path / "out"), **settings})

    with pytest.raises(ModelError, match="expected a reward model"):
        run("ppo", ppo(reward_model=words))
    shutil.copytree(words, tmp_path / "no_weights")
    (tmp_path / "no_weights/model.safetensors").unlink()
    with pytest.raises(ModelError, match="no_weights: expected weights"):
        run("ppo", ppo(reference_model=str(tmp_path / "no_weights")))
    shutil.copytree(words, tmp_path / "other")
    train_bpe_tokenizer([], 300, tmp_path / "other")
    with pytest.raises(ModelError, match="tokenizer does not match the model"):
        run("ppo", ppo(model_name_or_path=str(tmp_path / "other")))
    with pytest.raises(DataError, match="0 of 14 rows kept, 14 too long"):
        run("ppo", ppo(max_prompt_tokens=1, prompts=(write_rows(
            tmp_path / "long.jsonl", [{"prompt": f"{word} a cat"} for word in WORDS]),)))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="stage kind: unknown key 'pop'; did you mean 'ppo'"):
        run("pop", ppo())


def test_a_folder_is_not_kept_when_the_trainer_refuses_its_settings(words, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", [{"prompt": f"{word} was"} for word in WORDS[:8]])
    settings = {
        "model_name_or_path": words, "reward_model": str(tmp_path / "reward"),
        "prompts": (prompts,), "output_dir": str(tmp_path / "out"), "num_iterations": 1,
        "rollout_batch_size": 4, "minibatch_size": 4, "eval_steps": None}
    with pytest.raises(ConfigError, match="expected prompt and response to fit"):
        run("ppo", PPORun(**settings, sampling=SamplingConfig(max_new_tokens=500)))
    assert not (tmp_path / "out").exists()
    folder, _ = run("ppo", PPORun(**settings, sampling=SamplingConfig(max_new_tokens=4)))
    assert (folder / "finished.json").exists()
    with pytest.raises(ConfigError, match="holds a finished run"):
        run("ppo", PPORun(**settings, sampling=SamplingConfig(max_new_tokens=4)))
    assert (folder / "finished.json").exists()
