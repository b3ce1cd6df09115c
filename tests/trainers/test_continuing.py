"""SFT, reward and DPO trainers that stop after any step and go on elsewhere, bit for bit."""

import pytest
import torch

from fastrl.checkpoints import State
from fastrl.config import DPOConfig, RewardConfig, SFTConfig
from fastrl.errors import CheckpointError
from fastrl.metrics import RunFolder
from fastrl.models import DecoderConfig, new_decoder, scalar_from_causal
from fastrl.trainers.dpo import DPOTrainer
from fastrl.trainers.reward import RewardTrainer
from fastrl.trainers.sft import SFTTrainer
from fastrl.types import Comparison, TokenExample

DECODER = DecoderConfig(
    family="llama", vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_positions=64, rotary_dim=8, initializer_range=0.2)
SETTINGS = dict(learning_rate=1e-2, batch_size=2, warmup_steps=1, eval_steps=2, max_steps=5)
NUM_STEPS = 5


def tokens(generator, low, high):
    count = int(torch.randint(low, high, (), generator=generator))
    return tuple(torch.randint(17, (count,), generator=generator).tolist())


def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = [tokens(generator, 3, 9) for _ in range(count)]
    return [TokenExample(row, (False,) + (True,) * (len(row) - 1)) for row in rows]


def rankings(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [Comparison(tokens(generator, 1, 4), tuple(tokens(generator, 1, 5) for _ in range(3)),
                       (0, 2, 1)) for _ in range(count)]


def make_sft(run, **changes):
    model = new_decoder(DECODER, 0).to(changes.pop("weights", torch.float32))
    config = SFTConfig(**SETTINGS | dict(residual_dropout=0.2, ptx_ratio=0.7, select_by="loss",
                                         max_seq_tokens=64) | changes)
    return SFTTrainer(config, model, examples(7, 1), eval=examples(3, 2), ptx=examples(4, 3),
                      run=run), model


def make_reward(run, **changes):
    model = scalar_from_causal(new_decoder(DECODER, 0), seed=0)
    model = model.to(changes.pop("weights", torch.float32))
    config = RewardConfig(**SETTINGS | changes)
    return RewardTrainer(config, model, rankings(7, 1), eval=rankings(3, 2),
                         demonstrations=examples(3, 3), run=run), model


def make_dpo(run, **changes):
    model = new_decoder(DECODER, 0).to(changes.pop("weights", torch.float32))
    config = DPOConfig(**SETTINGS | changes)
    return DPOTrainer(config, model, rankings(7, 1), eval=rankings(3, 2), run=run), model


MAKERS = {"sft": make_sft, "reward": make_reward, "dpo": make_dpo}


class Stop(Exception):
    """Ends `train` after a step."""


class StopAfter:
    """A progress that ends training once `step` is done and logged."""

    def __init__(self, step):
        self.step = step

    def update(self, step, metrics):
        if step == self.step:
            raise Stop


def run_to(trainer, step):
    with pytest.raises(Stop):
        trainer.train(StopAfter(step))


def run_folder(path):
    return RunFolder(path, SFTConfig(), stage="test")


def outcome(model, folder):
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return weights, (folder.path / "metrics.jsonl").read_text()


def is_equal(a, b):
    return a[1] == b[1] and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def whole(kind, path, **changes):
    folder = run_folder(path)
    trainer, model = MAKERS[kind](folder, **changes)
    trainer.train()
    return outcome(model, folder)


def continued(kind, path, step, change=lambda state: state, **changes):
    """Train to `step`, hand the state over to new objects, and train on in the same folder."""
    folder = run_folder(path)
    first, _ = MAKERS[kind](folder, **changes)
    run_to(first, step)
    state = change(first.state().copied())
    second, model = MAKERS[kind](folder, **changes)
    second.load_state(state)
    second.train()
    return outcome(model, folder)


VARIANTS = {
    "float32": {},
    "bfloat16": {"weights": torch.bfloat16},
    "8bit": {"optimizer_moments": "8bit"},
    "lora": {"lora_rank": 2},
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_continued_after_any_step_is_the_run_that_never_stopped(kind, tmp_path):
    expected = whole(kind, tmp_path / "whole")
    for step in range(1, NUM_STEPS):
        found = continued(kind, tmp_path / f"from-{step}", step)
        assert is_equal(found, expected), f"stopped after step {step}"


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("variant", ["bfloat16", "8bit", "lora"])
def test_so_is_one_with_other_weights_and_moments(kind, variant, tmp_path):
    expected = whole(kind, tmp_path / "whole", **VARIANTS[variant])
    assert is_equal(continued(kind, tmp_path / "two", 3, **VARIANTS[variant]), expected)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_holds_tensors_by_reference(kind):
    trainer, model = MAKERS[kind](None)
    trainer.step()
    name, weight = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    assert trainer.state().tensors[f"model.{name}"].data_ptr() == weight.data_ptr()


def names_of(kind):
    trainer, _ = MAKERS[kind](None)
    trainer.step()
    trainer.step()
    if kind == "sft":
        trainer._evaluate(2)
    state = trainer.state()
    return [*state.tensors, *state.values]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_state_with_any_part_missing_is_refused(kind):
    trainer, _ = MAKERS[kind](None)
    trainer.step()
    state = trainer.state().copied()
    for name in names_of(kind):
        tensors = {key: value for key, value in state.tensors.items() if key != name}
        values = {key: value for key, value in state.values.items() if key != name}
        if len(tensors) + len(values) == len(state.tensors) + len(state.values):
            continue  # of a best checkpoint that is not there yet
        with pytest.raises(CheckpointError, match="expected"):
            MAKERS[kind](None)[0].load_state(State(tensors, values))


def zeroed(*names):
    """Forget what these parts hold: what a state that leaves them out would do."""
    def change(state):
        for name in names:
            found = [key for key in state.tensors if key.startswith(name)]
            assert found or name in state.values, name
            for key in found:
                state.tensors[key].zero_()
            if name in state.values:
                state.values[name] = type(state.values[name])()
        return state
    return change


@pytest.mark.parametrize("kind, part", [
    *((kind, part) for kind in MAKERS for part in (
        "model.", "optimizer.num_steps", "optimizer.first.", "optimizer.second.", "num_finished")),
    ("sft", "num_examples"), ("sft", "num_windows"), ("sft", "best_weight."),
])
def test_each_part_decides_the_result(kind, part, tmp_path):
    # With steps that large the loss only grows after step 2: its weights are the best.
    settings = {"lr_schedule": "constant", "learning_rate": 1.0} if "best" in part else {}
    expected = whole(kind, tmp_path / "whole", **settings)
    assert is_equal(continued(kind, tmp_path / "kept", 3, **settings), expected)
    assert not is_equal(continued(kind, tmp_path / "lost", 3, zeroed(part), **settings), expected)


def test_remainders_of_bfloat16_weights_decide_the_result(tmp_path):
    expected = whole("sft", tmp_path / "whole", weights=torch.bfloat16)
    lost = continued("sft", tmp_path / "lost", 3, zeroed("optimizer.remainder."),
                     weights=torch.bfloat16)
    assert not is_equal(lost, expected)


def test_the_selected_step_is_known_after_a_stop():
    trainer, _ = make_sft(None)
    run_to(trainer, 3)
    again, _ = make_sft(None)
    again.load_state(trainer.state().copied())
    assert trainer.selected_step == 2 and again.selected_step == 2
    again.train()
    trainer.train()
    assert again.selected_step == trainer.selected_step


@pytest.mark.parametrize("kind", MAKERS)
def test_a_halved_budget_stays_halved(kind):
    trainer, _ = MAKERS[kind](None)
    trainer.step()
    trainer.budget._passes.max_tokens = 13
    trainer.passes.max_tokens = 11
    again, _ = MAKERS[kind](None)
    again.load_state(trainer.state().copied())
    assert again.passes.max_tokens == 11
    assert again.step()["memory/max_tokens_per_microbatch"] == 13.0


@pytest.mark.parametrize("kind", MAKERS)
def test_another_shape_and_another_kind_are_refused_and_change_nothing(kind):
    trainer, model = MAKERS[kind](None)
    trainer.step()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = trainer.state().copied()
    name = next(key for key in other.tensors if key.startswith("model."))
    other.tensors[name] = other.tensors[name][:1]
    with pytest.raises(CheckpointError, match=f"expected {name}"):
        trainer.load_state(other)
    wrong = make_dpo(None)[0] if kind != "dpo" else make_reward(None)[0]
    with pytest.raises(CheckpointError, match="(?i)expected"):
        trainer.load_state(wrong.state())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
