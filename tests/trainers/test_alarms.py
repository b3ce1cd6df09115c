"""Planted pathologies are named within one iteration; healthy runs give no alarm."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastrl import alarms
from fastrl.alarms import KINDS, Circumstances, Past, find_alarms
from fastrl.checkpoints import State
from fastrl.config import DPOConfig, RewardConfig, SamplingConfig, SFTConfig
from fastrl.data import load_prompts, word_tokenizer
from fastrl.errors import ConfigError, DataError, NumericsError
from fastrl.metrics import RunFolder
from fastrl.models.causal_lm import scalar_from_causal
from fastrl.report import write_report
from fastrl.trainers.alarm_log import AlarmLog
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, Prompt, Rollout, TokenExample

GRPO: dict[str, Any] = {"advantage": "grpo", "num_samples_per_prompt": 4}


def named(trainer: Any) -> set[str]:
    """Alarms of the trainer's last step."""
    return {alarm.name for alarm in trainer.alarms.current}


def scores_from(*rounds: Callable[[Rollout], torch.Tensor]) -> Callable[[Rollout], torch.Tensor]:
    """A scorer that changes from call to call; the last one stays."""
    left = list(rounds)
    return lambda rollout: (left.pop(0) if len(left) > 1 else left[0])(rollout)


def zeros(rollout: Rollout) -> torch.Tensor:
    return torch.zeros(rollout.batch_size)


def by_prompt(rollout: Rollout) -> torch.Tensor:
    """A score that depends on the prompt alone."""
    return torch.tensor([float(rollout.sequence(i)[0]) for i in range(rollout.batch_size)])


def favour(model: Any, token: int, by: float = 60.0) -> Any:
    """The model with a bias of its head towards one token."""
    model = copy.deepcopy(model)
    bias = torch.zeros(len(model.lm_head.weight))
    bias[token] = by
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def one_step(task: SimpleNamespace, **settings: Any) -> set[str]:
    trainer = task.make_trainer(**settings)
    trainer.step()
    return named(trainer)


def test_equal_scores(task: SimpleNamespace) -> None:
    assert "equal_scores" in one_step(task, scorer=zeros)
    clipped = one_step(task, scorer=lambda r: torch.arange(r.batch_size) + 5.0, reward_clip=2.0)
    assert "equal_scores" in clipped


def test_equal_scores_in_every_group(task: SimpleNamespace) -> None:
    assert named_groups(task, by_prompt) == {"equal_groups", "no_gradient"}
    assert "equal_scores" in named_groups(task, zeros)


def named_groups(task: SimpleNamespace, scorer: Callable[[Rollout], torch.Tensor]) -> set[str]:
    return one_step(task, scorer=scorer, kl_coef=0.0, **GRPO)


def test_scores_out_of_range(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(scorer=scores_from(
        task.score_even, lambda r: task.score_even(r) - 1000 * (torch.arange(r.batch_size) == 3)))
    trainer.step()
    assert named(trainer) == set()
    trainer.step()
    assert "scores_out_of_range" in named(trainer)
    expected = {"inputs": {"expected_scores": (5.0, 0.1)}}
    assert "scores_out_of_range" in one_step(task, **expected)
    assert one_step(task, inputs={"expected_scores": (0.5, 0.3)}) == set()


def test_empty_responses(task: SimpleNamespace) -> None:
    policy = favour(task.tiny_model(), task.EOS)
    assert "empty_responses" in one_step(task, policy=policy)


def test_identical_responses_and_collapsed_entropy(task: SimpleNamespace) -> None:
    found = one_step(task, policy=favour(task.tiny_model(), 5))
    assert {"identical_responses", "entropy_collapse"} <= found


def test_entropy_that_collapses_later(task: SimpleNamespace) -> None:
    trainer = task.make_trainer()
    trainer.step()
    head = trainer.policy.lm_head.weight
    with torch.no_grad():
        head *= 30
    trainer.step()
    assert "entropy_collapse" in named(trainer)


def test_no_response_ended(task: SimpleNamespace) -> None:
    never: dict[str, Any] = {
        "policy": task.tiny_model(vocab_size=2000),
        "sampling": SamplingConfig(max_new_tokens=2, stop_token_ids=(1999,))}
    assert "no_response_ended" in one_step(task, missing_eos_penalty=-1.0, **never)
    assert "no_response_ended" not in one_step(task, missing_eos_penalty=None, **never)


def test_kl_that_explodes(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(num_iterations=4, learning_rate=3.0, max_grad_norm=None)
    trainer.step()
    assert "kl_explodes" not in named(trainer)
    trainer.step()
    assert "kl_explodes" in named(trainer)


def test_kl_below_zero(task: SimpleNamespace) -> None:
    """log-probs of the policy at one temperature, of the reference at another."""
    trainer = task.make_trainer()
    reference = trainer.reference
    with torch.no_grad():
        reference.lm_head.weight *= 4
    sampled = copy.deepcopy(reference)
    with torch.no_grad():
        for p, q in zip(trainer.policy.parameters(), sampled.parameters(), strict=True):
            p.copy_(q)
    own = trainer._old_logprobs
    trainer._old_logprobs = lambda rollout: (own(rollout)[0] * 4, {})
    trainer.step()
    assert "kl_negative" in named(trainer)


def test_a_large_update(task: SimpleNamespace) -> None:
    found = one_step(task, learning_rate=1.0, num_inner_epochs=4, max_grad_norm=None)
    assert "large_update" in found


def test_no_update(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(max_approx_kl=1e-6)
    trainer._old_logprobs = lambda rollout: (rollout.rollout_logprobs - 0.5, {})
    trainer.step()
    assert "no_update" in named(trainer)


def test_ratio_that_is_not_one(task: SimpleNamespace) -> None:
    """Weights that change between rollout and update, unseen where no row is recomputed."""
    trainer = task.make_trainer(num_logprob_checks=0)
    update = trainer._update

    def change(*args: Any) -> dict[str, float]:
        with torch.no_grad():
            trainer.policy.lm_head.weight *= 0.3
        return dict(update(*args))

    trainer._update = change
    trainer.step()
    assert "ratio_not_one" in named(trainer)


def test_a_value_loss_that_explodes(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(scorer=scores_from(
        task.score_even, lambda r: task.score_even(r) + 1000))
    trainer.step()
    trainer.step()
    assert "value_loss_explodes" in named(trainer)


def test_most_prompts_are_too_long(task: SimpleNamespace) -> None:
    long = [Prompt((2, 3, 4, 5, 6), "")] * 20
    assert "data_dropped" in one_step(task, prompts=[*task.PROMPTS, *long], max_prompt_tokens=4)


def examples(count: int = 16) -> list[TokenExample]:
    return [TokenExample((2 + i % 7, 3, 4 + i % 5, 1), (False, True, True, True))
            for i in range(count)]


def sft(task: SimpleNamespace, **settings: Any) -> SFTTrainer:
    config = SFTConfig(**{"batch_size": 4, "max_steps": 8, "learning_rate": 1e-3,
                          "residual_dropout": 0.0, "select_by": "last", **settings})
    return SFTTrainer(config, task.tiny_model(), examples())


def test_a_learning_rate_of_zero(task: SimpleNamespace) -> None:
    trainer = sft(task)
    trainer.schedule = lambda step: 0.0  # type: ignore[assignment]
    trainer.alarms.look(2, trainer.step())
    assert named(trainer) == {"no_learning_rate"}
    for step in (1, 8):  # where a schedule may begin and end
        trainer.alarms.look(step, {"lr/model": 0.0})
        assert named(trainer) == set()


def test_a_loss_and_a_gradient_that_explode(task: SimpleNamespace) -> None:
    trainer = sft(task)
    for step in (1, 2, 3):
        trainer.alarms.look(step, trainer.step())
        assert named(trainer) == set()
    with torch.no_grad():
        trainer.model.lm_head.weight *= 300
    trainer.alarms.look(4, trainer.step())
    assert named(trainer) == {"loss_explodes", "gradient_explodes"}


RANKINGS = [Comparison((2, 3 + i % 3), ((4, 1), (5, 6, 1)), (0, 1)) for i in range(8)]


def test_rankings_train_with_alarms_too(task: SimpleNamespace) -> None:
    config: dict[str, Any] = {"batch_size": 2, "max_steps": 4, "stop_at_alarms": ("data_dropped",)}
    ties = [Comparison((2, 3), ((4, 1), (5, 1)), (0, 0))] * 9
    model = task.tiny_model()
    for trainer in (RewardTrainer(RewardConfig(**config), scalar_from_causal(model, 0),
                                  RANKINGS + ties),
                    DPOTrainer(DPOConfig(**config), model, RANKINGS + ties)):
        with pytest.raises(NumericsError, match="step 1: .*alarm data_dropped: 53% of the rows"):
            trainer.train()
    twice = [Comparison((2, 3), ((4, 1), (4, 1)), (0, 1))] * 2
    trainer = RewardTrainer(RewardConfig(batch_size=8, max_steps=1), scalar_from_causal(model, 0),
                            RANKINGS, eval=twice)
    trainer.train()
    assert "equal_scores" in named(trainer)


def test_an_alarm_is_said_once_counted_listed_and_reported(
    task: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = scores_from(task.score_even, zeros, zeros, task.score_even, zeros, zeros)
    with RunFolder(tmp_path, task.make_trainer().config, stage="ppo") as folder, \
            caplog.at_level(logging.WARNING, logger="fastrl"):
        trainer = task.make_trainer(scorer=scorer, num_iterations=6, inputs={"run": folder})
        trainer.train()
        folder.finish()
    assert caplog.text.count("alarm equal_scores: all scores are 0") == 1
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("alarm/equal_scores") for row in rows] == [None, 1, 2, 2, 3, 4]
    listed = [json.loads(line) for line in (tmp_path / "alarms.jsonl").read_text().splitlines()]
    assert [row["step"] for row in listed if row["alarm"] == "equal_scores"] == [2, 5]
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "equal scores" in page and KINDS["equal_scores"].advice in page


def test_an_alarm_can_end_the_run(task: SimpleNamespace) -> None:
    trainer = task.make_trainer(scorer=zeros, stop_at_alarms=("equal_scores",))
    with pytest.raises(NumericsError, match="step 1: expected no alarm of stop_at_alarms, got "
                                            "alarm equal_scores: all scores are 0; check"):
        trainer.train()
    with pytest.raises(ConfigError, match="stop_at_alarms: expected names of alarms .*'nothing'"):
        SFTConfig(stop_at_alarms=("nothing",))


def test_state_goes_on_where_it_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    facts = Circumstances(num_steps=9, num_responses=8)

    def row(loss: float) -> dict[str, float]:
        return {"loss/train": loss, "lr/model": 0.0}

    first = AlarmLog(SFTConfig(), facts)
    for step in (1, 2, 3):
        first.look(step, row(2.0))
    state = first.state()
    stored = State(values=json.loads(json.dumps(state.values)))
    second = AlarmLog(SFTConfig(), facts)
    second.load_state(stored)
    caplog.clear()
    assert second.look(4, row(9.0)) == first.look(4, row(9.0)) == {
        "alarm/no_learning_rate": 3.0, "alarm/loss_explodes": 1.0}
    assert second.state().values == first.state().values
    assert caplog.text.count("loss_explodes") == 2 and "no_learning_rate" not in caplog.text


def test_thresholds_are_bounds_and_not_hints() -> None:
    """One below each of them is healthy."""
    facts = Circumstances(num_steps=9, num_responses=8)
    past = {"loss/train": Past(2.0, 2.0, 1.0, 2.0, 5), "grad/norm": Past(1.0, 1.0, 1.0, 1.0, 5)}
    assert find_alarms(4, {"loss/train": 5.9, "grad/norm": 99.0}, past, facts) == []
    found = find_alarms(4, {"loss/train": 6.1, "grad/norm": 101.0}, past, facts)
    assert [alarm.name for alarm in found] == ["gradient_explodes", "loss_explodes"]


@pytest.mark.parametrize("seed", range(4))
def test_healthy_runs_give_no_alarm(task: SimpleNamespace, seed: int) -> None:
    """Twenty seeds were tried once, docs/log.md."""
    assert healthy(task, seed) == {}


def healthy(task: SimpleNamespace, seed: int) -> dict[str, int]:
    """Alarms of short runs of every kind; each of them learns something."""
    policy, counts = task.tiny_model(seed=seed), dict[str, int]()
    settings: dict[str, Any] = {"seed": seed, "num_iterations": 5, "rollout_batch_size": 16}
    for other in ({}, GRPO, {"num_inner_epochs": 2}):
        trainer = task.make_trainer(copy.deepcopy(policy), **settings, **other)
        trainer.train()
        counts |= trainer.alarms.counts
    more: dict[str, Any] = {"seed": seed, "batch_size": 4, "max_steps": 6, "learning_rate": 1e-3}
    for one in (SFTTrainer(SFTConfig(**more, select_by="last"), copy.deepcopy(policy), examples()),
                RewardTrainer(RewardConfig(**more), scalar_from_causal(policy, seed), RANKINGS,
                              eval=RANKINGS),
                DPOTrainer(DPOConfig(**more), copy.deepcopy(policy), RANKINGS)):
        one.train()
        counts |= one.alarms.counts
    return counts


def test_the_page_lists_every_alarm(pytestconfig: pytest.Config) -> None:
    page = (pytestconfig.rootpath / "docs" / "alarms.md").read_text(encoding="utf-8")
    assert page.endswith(alarms.to_markdown()), (
        "fastrl/alarms.py changed; write the table of docs/alarms.md again: python -c "
        "'from fastrl.alarms import to_markdown; print(to_markdown())'")
    for kind in KINDS.values():
        assert kind.meaning[0].isupper() and kind.meaning.endswith(".") and kind.advice


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl", "alarms.jsonl"])
def test_a_full_disk_is_named(task: SimpleNamespace, tmp_path: Path, name: str) -> None:
    """/dev/full has no room, as a full disk has none."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full on this system")
    with RunFolder(tmp_path / "run", task.make_trainer().config, stage="ppo") as folder:
        (folder.path / name).symlink_to("/dev/full")
        trainer = task.make_trainer(scorer=zeros, inputs={"run": folder})
        with pytest.raises(OSError, match="No space left") as error:
            trainer.step()
    assert error.value.filename == str(tmp_path / "run" / name)


def test_a_data_file_that_dies_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    """Rows are read once: what is learned from does not depend on the file afterwards."""
    encoder = word_tokenizer("a b c d e".split(), tmp_path / "tokenizer")

    def prompts(name: str) -> tuple[Path, list[Prompt]]:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": f"a {word}"}) + "\n" for word in "bcde"))
        return path, load_prompts(path, encoder, 8)[0]

    path, rows = prompts("deleted.jsonl")
    before = list(rows)
    path.unlink()
    assert list(rows) == before and len(before) == 4
    path, rows = prompts("cut.jsonl")
    with path.open("r+") as file:
        file.truncate(11)
    assert list(rows) == before
    with pytest.raises(DataError, match="cut.jsonl"):
        load_prompts(path, encoder, 8)
    with pytest.raises(DataError, match="deleted.jsonl"):
        load_prompts(tmp_path / "deleted.jsonl", encoder, 8)
