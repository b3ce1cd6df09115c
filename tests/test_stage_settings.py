"""What a stage hands to its trainer: every file and setting of the run arrives where it belongs."""

import importlib
import io
import json

import pytest
import torch

from fastrl.config import SamplingConfig
from fastrl.console import Console
from fastrl.data import load_encoder, word_tokenizer
from fastrl.errors import ModelError
from fastrl.models import load_causal_lm, new_decoder, scalar_from_causal
from fastrl.models.families import decoder_config
from fastrl.models.weights import save_causal_lm, save_scalar_model
from fastrl.report import write_report
from fastrl.runs import EvaluateRun, PPORun, PretrainRun, RewardRun, SelectRun, SFTRun
from fastrl.stages import run_stage
from fastrl.stages.inputs import load_policy, load_reward_model

WORDS = "the fox owl bear eats likes berries honey mice . ?".split()


class Caught(Exception):
    """Carries what a trainer was made with."""


@pytest.fixture
def place(tmp_path):
    """Two language models, a reward model and a file of every kind."""
    encoder = word_tokenizer(WORDS, tmp_path / "tokenizer")
    shape = decoder_config("llama", vocab_size=encoder.max_token_id + 1, hidden_size=16,
                           num_layers=1, num_heads=2, max_positions=128, eos_token_ids=())
    for seed, name in enumerate(("model", "other")):
        save_causal_lm(new_decoder(shape, seed=seed), tmp_path / name, tokenizer_from=encoder.path)
    save_scalar_model(scalar_from_causal(new_decoder(shape, seed=2), 2), tmp_path / "judge",
                      tokenizer_from=encoder.path)
    write(tmp_path / "text.txt", "the fox eats berries .\n\n" * 8)
    write(tmp_path / "held.txt", "the owl eats mice .\n\n" * 4)
    rows(tmp_path / "demos.jsonl", [{"prompt": f"the {w}", "completion": "eats ."} for w in WORDS])
    rows(tmp_path / "held.jsonl", [{"prompt": "the bear", "completion": "likes honey ."}])
    rows(tmp_path / "pairs.jsonl", [{"prompt": w, "chosen": "berries", "rejected": "mice"}
                                    for w in WORDS])
    rows(tmp_path / "prompts.jsonl", [{"prompt": f"the {w}", "source": "ab"[i % 2]}
                                      for i, w in enumerate(WORDS)])
    rows(tmp_path / "eval.jsonl", [{"prompt": "owl likes"}, {"prompt": "bear eats"}])
    return tmp_path


def write(path, text):
    path.write_text(text)


def rows(path, values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def run(kind, config):
    return run_stage(kind, config, console=Console(file=io.StringIO()))


def caught(monkeypatch, name, kind, config, module="training"):
    """(args, kwargs) of the first call of `name` in a stage, which ends there."""
    def stop(*args, **kwargs):
        raise Caught(args, kwargs)

    monkeypatch.setattr(importlib.import_module(f"fastrl.stages.{module}"), name, stop)
    with pytest.raises(Caught) as error:
        run(kind, config)
    return error.value.args


def names(place, **files):
    return {"output_dir": str(place / "out"),
            **{key: str(place / file) for key, file in files.items()}}


def test_pretraining_gets_shape_tokenizer_and_held_out_text(place, monkeypatch):
    rows(place / "more.jsonl", [{"prompt": "zebra zebra zebra " * 20, "completion": "x"}])
    (config, model, train), others = caught(monkeypatch, "SFTTrainer", "pretrain", PretrainRun(
        **names(place), data=(str(place / "text.txt"),), eval_data=(str(place / "held.txt"),),
        tokenizer_data=(str(place / "more.jsonl"),), vocab_size=300, family="qwen2",
        hidden_size=24, num_layers=2, num_heads=6, num_kv_heads=2, intermediate_size=40,
        max_positions=48, window_tokens=12, seed=5))
    spec = model.spec
    assert (spec.architecture, spec.hidden_size, spec.num_layers, spec.num_heads,
            spec.num_kv_heads, spec.max_positions) == ("qwen2", 24, 2, 6, 2, 48)
    assert {len(window.token_ids) for window in train[:-1]} == {12}
    assert others["eval"] and others["run"].path == place / "out"
    vocabulary = json.loads((place / "out/tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert any("zebra" in token for token in vocabulary) and spec.vocab_size <= 300
    assert config.seed == 5


def test_sft_gets_its_files(place, monkeypatch):
    encoder = load_encoder(place / "model")
    settings = {"data": (str(place / "demos.jsonl"),), "ptx_data": (str(place / "text.txt"),),
                "ptx_window_tokens": 7, "ptx_ratio": 1.0}
    (_, model, train), others = caught(monkeypatch, "SFTTrainer", "sft", SFTRun(
        **names(place, model_name_or_path="other"), **settings,
        eval_data=(str(place / "held.jsonl"),), loss_on="all"))
    assert len(train) == len(WORDS) and train[0].loss_mask == (False, True, True, True, True)
    (held,) = others["eval"]
    assert encoder.decode(held.token_ids[:5]) == "the bear likes honey ."
    assert held.loss_mask == (False, True, True, True, True, True)
    assert len(others["ptx"][0].token_ids) == 7 and others["score"] is None
    expected = load_causal_lm(place / "other").lm_head.weight
    assert torch.equal(model.lm_head.weight, expected)

    (_, _, train), others = caught(monkeypatch, "SFTTrainer", "sft", SFTRun(
        **names(place, model_name_or_path="model") | {"output_dir": str(place / "second")},
        **settings, eval_fraction=0.3))
    assert len(others["eval"]) == 3 and len(train) == len(WORDS) - 3
    assert train[0].loss_mask == (False, False, True, True, True)


def test_sft_is_judged_on_held_out_prompts(place, monkeypatch):
    _, others = caught(monkeypatch, "SFTTrainer", "sft", SFTRun(
        **names(place, model_name_or_path="model", reward_model="judge"),
        data=(str(place / "demos.jsonl"),), eval_data=(str(place / "held.jsonl"),),
        select_by="reward"))
    encoder = load_encoder(place / "model")
    assert [encoder.decode(ids) for ids in others["score"].prompts] == ["the bear"]


def test_reward_gets_its_files_and_a_head_of_its_seed(place, monkeypatch):
    heads = []
    for seed in (0, 1):
        (_, model, train), others = caught(monkeypatch, "RewardTrainer", "reward", RewardRun(
            **names(place, model_name_or_path="model") | {"output_dir": str(place / f"{seed}")},
            data=(str(place / "pairs.jsonl"),), eval_data=(str(place / "pairs.jsonl"),),
            demonstrations=(str(place / "demos.jsonl"),), seed=seed))
        assert len(train) == len(others["eval"]) == len(others["demonstrations"]) == len(WORDS)
        heads.append(model.head.weight)
    assert not torch.equal(*heads)


def test_ppo_gets_its_files_and_models(place, monkeypatch):
    config = PPORun(
        **names(place, model_name_or_path="model", reference_model="other", reward_model="judge"),
        prompts=(str(place / "prompts.jsonl"),), eval_prompts=(str(place / "eval.jsonl"),),
        source_weights={"a": 1.0, "b": 0.0}, num_iterations=3, rollout_batch_size=4,
        minibatch_size=2, num_samples_per_prompt=2, ptx_coef=1.0,
        ptx_data=(str(place / "text.txt"),), eval_ptx_data=(str(place / "held.txt"),),
        ptx_window_tokens=9)
    args, others = caught(monkeypatch, "PPOTrainer", "ppo", config)
    _, policy, reference, critic, scorer, train = args
    for model, name in ((policy, "model"), (reference, "other")):
        assert torch.equal(model.lm_head.weight, load_causal_lm(place / name).lm_head.weight)
    assert torch.equal(critic.head.weight, scorer.model.head.weight)
    assert critic.backbone is not scorer.model.backbone
    assert [prompt.text for prompt in others["eval_prompts"]] == ["owl likes", "bear eats"]
    assert len(train) == 6 and {prompt.source for prompt in train} == {"a"}
    texts = {name: load_encoder(place / "model").decode(others[name][0].token_ids)
             for name in ("ptx", "eval_ptx")}
    assert "fox" in texts["ptx"] and "owl" in texts["eval_ptx"]
    assert len(others["ptx"][0].token_ids) == 9 and others["encoder"] is not None


@pytest.mark.parametrize("trunk", ["reward", "policy"])
def test_ppo_without_a_reference_and_with_a_shared_trunk(place, monkeypatch, trunk):
    config = PPORun(
        **names(place, model_name_or_path="model", reward_model="judge"), reference="none",
        kl_coef=0.0, critic_trunk=trunk, critic_init=trunk,
        prompts=(str(place / "prompts.jsonl"),))
    (_, policy, reference, critic, scorer, _), _ = caught(monkeypatch, "PPOTrainer", "ppo", config)
    assert reference is None
    assert critic.backbone is (policy if trunk == "policy" else scorer.model).backbone
    assert critic.head.weight is not scorer.model.head.weight
    assert critic.head.weight.requires_grad


@pytest.mark.parametrize("trunk", ["own", "reward", "policy"])
def test_ppo_with_fewer_models_runs_to_its_report(place, trunk):
    """Loaded from files and parked between phases; the value head is not part of what is saved."""
    folder = run("ppo", PPORun(
        **names(place, model_name_or_path="model", reward_model="judge"), reference="none",
        kl_coef=0.0, critic_trunk=trunk, critic_init="policy" if trunk == "policy" else "reward",
        parking="on", num_critic_warmup_iterations=1, num_iterations=2, rollout_batch_size=4,
        minibatch_size=2, eval_steps=1, sampling=SamplingConfig(max_new_tokens=4),
        prompts=(str(place / "prompts.jsonl"),), eval_prompts=(str(place / "eval.jsonl"),)))
    seen = {name for line in (folder / "metrics.jsonl").read_text().splitlines()
            for name in json.loads(line)}
    assert {"eval/objective", "loss/policy", "loss/value", "lr/critic"} <= seen
    assert not [name for name in seen if "policy_ref" in name or "kl/coef" in name]
    saved, start = load_causal_lm(folder / "model"), load_causal_lm(place / "model")
    assert saved.state_dict().keys() == start.state_dict().keys()
    assert "eval/objective" in write_report(folder).read_text()


def test_selection_and_evaluation_use_as_much_as_they_are_told(place, monkeypatch):
    (_, judge), _ = caught(monkeypatch, "select_candidate", "select", SelectRun(
        **names(place, model_name_or_path="model", reward_model="judge"),
        prompts=(str(place / "prompts.jsonl"),), num_prompts=4))
    assert len(judge.prompts) == 4
    (_, windows, _), _ = caught(
        monkeypatch, "language_model_loss", "evaluate", EvaluateRun(
            models={"model": str(place / "model")}, reference="model",
            output_dir=str(place / "evaluation"), reward_model=str(place / "judge"),
            prompts=(str(place / "prompts.jsonl"),), num_prompts=2, window_tokens=8,
            text=(str(place / "text.txt"),), max_windows=3), module="evaluate")
    assert len(windows) == 3 and len(windows[0].token_ids) == 8


def test_responses_end_at_the_tokenizers_end_token_too(place):
    """The model's own files name none."""
    config = PPORun(**names(place, model_name_or_path="model", reward_model="judge"),
                    prompts=(str(place / "prompts.jsonl"),))
    encoder = load_encoder(place / "model")
    assert load_causal_lm(place / "model").spec.eos_token_ids == ()
    policy = load_policy(str(place / "model"), config, encoder)
    assert policy.spec.eos_token_ids == encoder.eos_token_ids != ()


@pytest.mark.parametrize(("load", "name"), [(load_policy, "model"), (load_reward_model, "judge")])
def test_every_model_must_know_the_tokens_of_the_tokenizer(place, load, name):
    config = PPORun(**names(place, model_name_or_path="model", reward_model="judge"),
                    prompts=(str(place / "prompts.jsonl"),))
    more = word_tokenizer([*WORDS, "wolf", "crab"], place / "more")
    with pytest.raises(ModelError, match="tokenizer does not match the model"):
        load(str(place / name), config, more)


def test_a_stage_writes_to_tensorboard_when_asked(place):
    folder = run("sft", SFTRun(
        **names(place, model_name_or_path="model"), data=(str(place / "demos.jsonl"),),
        max_steps=1, batch_size=2, report_to=("tensorboard",)))
    assert list((folder / "tensorboard").iterdir())
