"""SFT: memorising, masks, packing, dropout, pretraining mix, evaluation, selection, reruns."""

import json
import math

import pytest
import torch

from fastrl.config import SFTConfig
from fastrl.errors import ConfigError, DataError, NumericsError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import RunFolder, is_timing
from fastrl.models import DecoderConfig, new_decoder
from fastrl.models.weights import load_causal_lm
from fastrl.trainers.common import evaluate_token_loss
from fastrl.trainers.sft import SFTTrainer, pack_rows, select_candidate, usable_examples
from fastrl.types import TokenExample

VOCAB = 17


DECODER = DecoderConfig(
    family="llama", vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_positions=64, rotary_dim=8, initializer_range=0.2)


def make_model(dtype=torch.float32, seed=0):
    return new_decoder(DECODER, seed).to(dtype)


def make_config(**changes):
    settings = dict(learning_rate=3e-3, batch_size=4, num_epochs=2, residual_dropout=0.0,
                    select_by="last", max_seq_tokens=64)
    return SFTConfig(**(settings | changes))


def make_examples(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        n = int(torch.randint(3, 12, (), generator=generator))
        tokens = torch.randint(VOCAB, (n,), generator=generator).tolist()
        prompt = int(torch.randint(1, n, (), generator=generator))
        examples.append(TokenExample(tuple(tokens), (False,) * prompt + (True,) * (n - prompt)))
    return examples


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_bit_equal(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def deterministic(metrics):
    return {k: v for k, v in metrics.items() if not is_timing(k)}


def test_sft_memorises_a_sentence_per_prompt():
    mask = (False, False, True, True, True)
    examples = [TokenExample((p, 9, (3 * p) % 8, (5 * p + 1) % 8, 10), mask) for p in range(8)]
    model = make_model()
    trainer = SFTTrainer(make_config(batch_size=8, num_epochs=80, learning_rate=1e-2), model,
                         examples)
    trainer.train()
    assert trainer.num_steps == 80 and trainer.selected_step == 80
    assert evaluate_token_loss(model, examples, 100) < 0.02


def test_8bit_moments_reach_the_loss_of_float32_ones():
    losses = {}
    for moments in ("float32", "8bit"):
        model = make_model()
        config = make_config(num_epochs=20, optimizer_moments=moments, learning_rate=1e-2)
        SFTTrainer(config, model, make_examples(16)).train()
        losses[moments] = evaluate_token_loss(model, make_examples(16), 100)
    assert losses["float32"] < 1.6  # log 17 = 2.83 at the start
    assert losses["8bit"] == pytest.approx(losses["float32"], rel=0.02)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("packing", [False, True])
def test_token_budget_changes_nothing(dtype, tolerance, packing):
    results = []
    for max_tokens in (1, 13, 10_000):
        model = make_model(dtype)
        config = make_config(max_tokens_per_microbatch=max_tokens, packing=packing, batch_size=3,
                             max_seq_tokens=16, ptx_ratio=0.5)
        trainer = SFTTrainer(config, model, make_examples(11), ptx=make_examples(3, seed=1))
        results.append((trainer.step(), [p.grad for p in model.parameters()]))
    (expected, gradients), *others = results
    for metrics, other in others:
        assert metrics["loss/train"] == pytest.approx(expected["loss/train"], rel=tolerance)
        assert metrics["loss/ptx"] == pytest.approx(expected["loss/ptx"], rel=tolerance)
        for a, b in zip(gradients, other, strict=True):
            assert (a - b).norm() <= tolerance * a.norm()


def test_packed_rows_give_the_loss_and_gradients_of_single_examples():
    examples = make_examples(10)
    trainers = []
    for packing in (False, True):
        config = make_config(packing=packing, batch_size=10, max_seq_tokens=24,
                             max_grad_norm=None)
        trainers.append(SFTTrainer(config, make_model(torch.float64), examples))
    single, packed = trainers
    assert len(packed.rows) < 10 and sorted(i for row in packed.rows for i in row) == [*range(10)]
    assert packed.step()["loss/train"] == pytest.approx(single.step()["loss/train"], rel=1e-12)
    for a, b in zip(single.model.parameters(), packed.model.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-10 * a.grad.norm()


def test_pack_rows_is_best_fit_decreasing():
    assert pack_rows([3, 7, 2, 5, 3], 10) == [[1, 0], [3, 4, 2]]
    assert pack_rows([4, 4, 4], 4) == [[0], [1], [2]]
    assert pack_rows([], 4) == []


def test_loss_on_completion_and_on_everything():
    example = TokenExample((1, 2, 3, 4), (False, False, False, True))
    losses = {}
    for loss_on in ("completion", "all"):
        trainer = SFTTrainer(make_config(loss_on=loss_on), make_model(torch.float64), [example])
        metrics = trainer.step()
        losses[loss_on] = metrics["loss/train"], metrics["data/target_tokens"]
    model = make_model(torch.float64)
    singles = [TokenExample((1, 2, 3, 4), tuple(i == j for i in range(4))) for j in (1, 2, 3)]
    each = [evaluate_token_loss(model, [single], 10) for single in singles]
    assert losses["completion"] == (pytest.approx(each[2]), 1.0)
    assert losses["all"] == (pytest.approx(sum(each) / 3), 3.0)


def test_too_long_and_empty_examples_are_dropped_and_counted(caplog):
    examples = [TokenExample((1, 2), (False, True)), TokenExample((1,) * 9, (False,) * 8 + (True,)),
                TokenExample((1, 2), (False, False))]
    trainer = SFTTrainer(make_config(max_seq_tokens=8), make_model(), examples)
    assert trainer.num_dropped == 2 and len(trainer.examples) == 1
    assert "dropped 2 of 3 examples" in caplog.text
    with pytest.raises(DataError, match="SFT data: expected at least one row"):
        SFTTrainer(make_config(max_seq_tokens=8), make_model(), examples[1:])
    with pytest.raises(DataError, match="example 0: expected loss_mask"):
        usable_examples([TokenExample((1, 2), (True, True))], make_config())
    with pytest.raises(DataError, match="example 0: expected one loss_mask flag"):
        SFTTrainer(make_config(ptx_ratio=1.0), make_model(), examples,
                   ptx=[TokenExample((1, 2), (False,))])


def test_equal_seeds_are_bit_equal_and_other_seeds_are_not():
    runs = []
    for seed in (0, 0, 1):
        model = make_model()
        trainer = SFTTrainer(make_config(seed=seed, residual_dropout=0.3), model, make_examples(9))
        torch.manual_seed(seed + 17)  # the caller's generator does not matter
        runs.append(([deterministic(trainer.step()) for _ in range(5)], weights_of(model)))
    assert runs[0][0] == runs[1][0]
    assert_bit_equal(runs[0][1], runs[1][1])
    assert runs[0][0] != runs[2][0]


def test_dropout_is_on_in_steps_and_off_elsewhere():
    examples = make_examples(4)
    losses = {}
    for rate in (0.0, 0.5):
        model = make_model().eval()
        trainer = SFTTrainer(make_config(residual_dropout=rate, select_by="loss"), model, examples,
                             eval=examples)
        before = evaluate_token_loss(model, examples, 100)
        losses[rate] = trainer.step()["loss/train"]
        assert not model.training and model.backbone.residual_dropout == 0.0
        evaluated = evaluate_token_loss(model, examples, 100)
        assert evaluated == evaluate_token_loss(model, examples, 100)
        if rate == 0.0:
            assert losses[rate] == pytest.approx(before, rel=1e-6)
    assert losses[0.5] != pytest.approx(losses[0.0], rel=1e-3)


def test_residual_dropout_without_support_is_an_error():
    class Plain(torch.nn.Module):
        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk

        def forward(self, *args):
            return self.trunk(*args)

    model = make_model()
    model.backbone = Plain(model.backbone)
    with pytest.raises(ConfigError, match="residual_dropout: expected 0 for"):
        SFTTrainer(make_config(residual_dropout=0.2), model, make_examples(4))
    SFTTrainer(make_config(residual_dropout=0.0), model, make_examples(4)).step()


def test_pretraining_mix_adds_its_gradient_with_its_weight():
    examples, windows = make_examples(4), make_examples(6, seed=1)

    def gradients(**changes):
        model = make_model(torch.float64)
        trainer = SFTTrainer(make_config(max_grad_norm=None, **changes), model, examples,
                             ptx=windows)
        metrics = trainer.step()
        return metrics, [p.grad for p in model.parameters()]

    plain, base = gradients()
    once, single = gradients(ptx_ratio=1.0, ptx_coef=1.0)
    thrice, triple = gradients(ptx_ratio=1.0, ptx_coef=3.0)
    assert "loss/ptx" not in plain and once["loss/ptx"] == thrice["loss/ptx"]
    assert plain["loss/train"] == once["loss/train"]
    for b, s, t in zip(base, single, triple, strict=True):
        torch.testing.assert_close(t - b, 3 * (s - b))
    assert any((s - b).norm() > 1e-6 for b, s in zip(base, single, strict=True))


def test_ptx_ratio_is_exact_over_the_run():
    trainer = SFTTrainer(make_config(ptx_ratio=0.1, batch_size=4, num_epochs=5), make_model(),
                         make_examples(8), ptx=make_examples(3, seed=1))
    counts = ["loss/ptx" in trainer.step() for _ in range(10)]
    assert trainer.num_steps == 10 and sum(counts) == 4  # 0.1 * 40 examples


def test_learning_rates_follow_the_schedule():
    trainer = SFTTrainer(make_config(learning_rate=1.0, max_steps=5, warmup_steps=2,
                                     warmup_start_ratio=0.5), make_model(), make_examples(4))
    rates = [trainer.step()["lr/model"] for _ in range(5)]
    assert rates == pytest.approx([0.5, 0.75, 1.0, 0.55, 0.1])


def test_steps_epochs_and_evaluation_points():
    examples = make_examples(10)
    by_epoch = SFTTrainer(make_config(num_epochs=3), make_model(), examples)
    assert (by_epoch.steps_per_epoch, by_epoch.num_steps) == (3, 9)
    assert by_epoch.eval_points == [3, 6, 9]
    by_steps = SFTTrainer(make_config(max_steps=7, eval_steps=2, num_candidates=2), make_model(),
                          examples)
    assert by_steps.eval_points == [2, 4, 6, 7] and by_steps.candidate_points == [4, 7]


def overfitting_run(tmp_path, **changes):
    """Held-out text contradicts the training text, so held-out loss rises at the end."""
    train = [TokenExample((1, 2, 3, 4), (False, True, True, True))]
    held = [TokenExample((1, 2, 3, 5), (False, True, True, True))]
    run = RunFolder(tmp_path / "sft", make_config(), stage="sft")
    config = make_config(max_steps=30, eval_steps=2, learning_rate=2e-2, **changes)
    return SFTTrainer(config, make_model(), train, eval=held, run=run), held


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_select_by_loss_puts_the_best_weights_back(tmp_path):
    trainer, held = overfitting_run(tmp_path, select_by="loss")
    trainer.train()
    rows = [r for r in read_lines(tmp_path / "sft" / "metrics.jsonl") if "loss/eval" in r]
    assert [r["step"] for r in rows] == [*range(0, 31, 2)]
    best = min(rows[1:], key=lambda r: r["loss/eval"])
    assert trainer.selected_step == best["step"] < 30
    assert best["loss/eval"] < rows[-1]["loss/eval"]
    assert evaluate_token_loss(trainer.model, held, 100) == best["loss/eval"]


def test_select_last_keeps_the_last_weights(tmp_path):
    trainer, held = overfitting_run(tmp_path, select_by="last")
    trainer.train()
    last = read_lines(tmp_path / "sft" / "metrics.jsonl")[-1]
    assert trainer.selected_step == 30
    assert evaluate_token_loss(trainer.model, held, 100) == last["loss/eval"]


def test_select_by_reward_with_a_judge(tmp_path):
    trainer, _ = overfitting_run(tmp_path, select_by="reward", num_candidates=3)
    judged = []

    def score(model):
        assert not model.training
        judged.append(weights_of(model))
        return [0.0, 2.0, 1.0][len(judged) - 1]

    trainer.score = score
    trainer.train()
    assert trainer.candidate_points == [10, 20, 30] and trainer.selected_step == 20
    assert_bit_equal(weights_of(trainer.model), judged[1])
    scores = {r["step"]: r["select/score"]
              for r in read_lines(tmp_path / "sft" / "metrics.jsonl") if "select/score" in r}
    assert scores == {10: 0.0, 20: 2.0, 30: 1.0}


def test_select_by_reward_later_from_the_candidates(tmp_path):
    trainer, held = overfitting_run(tmp_path, select_by="reward", num_candidates=3)
    trainer.train()
    run_path = tmp_path / "sft"
    assert sorted(p.name for p in (run_path / "candidates").iterdir()) == [
        "step-10", "step-20", "step-30"]
    last = load_causal_lm(run_path / "candidates" / "step-30")
    assert_bit_equal(weights_of(last), weights_of(trainer.model))
    logged = {r["step"]: r["loss/eval"]
              for r in read_lines(run_path / "metrics.jsonl") if "loss/eval" in r}
    best = select_candidate(run_path, lambda model: -evaluate_token_loss(model, held, 100))
    expected = min((10, 20, 30), key=lambda step: logged[step])
    assert best == run_path / "candidates" / f"step-{expected}"
    saved = json.loads((run_path / "candidates" / "scores.json").read_text())
    assert saved["selected"] == f"step-{expected}"
    assert saved["scores"]["step-30"] == pytest.approx(-logged[30], rel=1e-6)
    with pytest.raises(NumericsError, match="select/score"):
        select_candidate(run_path, lambda model: math.nan)
    with pytest.raises(ConfigError, match="found none"):
        select_candidate(tmp_path, lambda model: 0.0)


@pytest.mark.parametrize("changes, message", [
    ({"select_by": "loss"}, "select_by: expected held-out examples"),
    ({"select_by": "reward"}, "select_by: expected a score or a run folder"),
    ({"ptx_ratio": 0.5}, "ptx_ratio: expected pretraining windows"),
])
def test_settings_that_need_what_is_not_given(changes, message):
    with pytest.raises(ConfigError, match=message):
        SFTTrainer(make_config(**changes), make_model(), make_examples(4))


def test_nan_stops_before_the_weights_change():
    model = make_model()
    trainer = SFTTrainer(make_config(), model, make_examples(4))
    trainer.step()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    before = weights_of(model)
    with pytest.raises(NumericsError, match="step 2: expected finite metrics, got loss/train"):
        trainer.step()
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_progress_hears_every_step_and_names_are_in_the_glossary(tmp_path):
    heard = []

    class Progress:
        def update(self, step, metrics):
            heard.append((step, dict(metrics)))

    with RunFolder(tmp_path / "run", make_config(), stage="sft") as run:
        examples = make_examples(8)
        trainer = SFTTrainer(
            make_config(ptx_ratio=1.0, select_by="reward", logging_steps=3, num_epochs=3),
            make_model(), examples, eval=examples, ptx=examples, run=run, score=lambda m: 1.0)
        trainer.train(Progress())
    assert [step for step, _ in heard] == [1, 2, 3, 4, 5, 6]
    assert {name for _, metrics in heard for name in metrics} <= GLOSSARY.keys()
    logged = [r["step"] for r in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert logged == [0, 2, 3, 4, 6]  # every third, and every evaluation


def test_pretraining_on_windows_learns_the_next_token():
    text = [(i * 3 + 1) % VOCAB for i in range(12 * 8)]
    windows = [TokenExample(tuple(text[i:i + 12]), (False,) + (True,) * 11)
               for i in range(0, len(text), 12)]
    model = make_model()
    before = evaluate_token_loss(model, windows, 1000)
    SFTTrainer(make_config(loss_on="all", max_steps=60, learning_rate=1e-2, batch_size=4,
                           packing=True, max_seq_tokens=24), model, windows).train()
    assert evaluate_token_loss(model, windows, 1000) < 0.3 * before
