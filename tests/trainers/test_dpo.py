"""DPO: formula, token budget, the reference, a task with a known optimum, bad input."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax, logsigmoid

from fastrl.config import DPOConfig
from fastrl.errors import ConfigError, DataError, NumericsError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import RunFolder
from fastrl.models import DecoderConfig, new_decoder
from fastrl.models.attention import PackedAttention
from fastrl.trainers import DPOTrainer
from fastrl.trainers.dpo_pairs import ranked_pairs
from fastrl.types import Comparison

VOCAB = 17
DECODER = DecoderConfig(
    family="llama", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_layers=2,
    num_heads=2, num_kv_heads=1, head_dim=8, max_positions=64, rotary_dim=8, initializer_range=0.2)


def make_policy(seed=0, dtype=torch.float64):
    return new_decoder(DECODER, seed).to(dtype)


def make_config(**changes):
    return DPOConfig(**(dict(learning_rate=1e-3, batch_size=4, dpo_beta=0.3) | changes))


def make_comparisons(count, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    rows = []
    for _ in range(count):
        k = draw(2, 5)
        completions = tuple(tuple(draw(0, VOCAB) for _ in range(draw(1, 6))) for _ in range(k))
        ranks = torch.randperm(k, generator=generator).tolist()
        ranks[0] = ranks[1] if k > 2 else ranks[0]
        rows.append(Comparison(tuple(draw(0, VOCAB) for _ in range(draw(1, 5))), completions,
                               tuple(ranks)))
    return rows


def logprob_by_hand(model, prompt, completion, is_mean):
    """One sequence, plain log-softmax."""
    tokens = torch.tensor(prompt + completion)
    attention = PackedAttention(torch.tensor([0, len(tokens)]), len(tokens))
    hidden = model(tokens, torch.arange(len(tokens)), attention)
    logprobs = log_softmax(hidden @ model.lm_head.weight.T, dim=-1)
    taken = logprobs[range(len(prompt) - 1, len(tokens) - 1), list(completion)]
    return taken.mean() if is_mean else taken.sum()


def loss_by_hand(policy, reference, comparisons, config):
    """The formula, one pair at a time; differentiable."""
    prompts = []
    for c in comparisons:
        def difference(i, c=c):
            values = [logprob_by_hand(model, c.prompt_ids, c.completions[i],
                                      config.loss_type == "ipo") for model in (policy, reference)]
            return values[0] - (values[1].detach() if config.reference == "copy" else 0)
        terms = []
        for i, rank in enumerate(c.ranks):
            for j, other in enumerate(c.ranks):
                if rank < other:
                    h, beta, smooth = difference(i) - difference(j), config.dpo_beta, \
                        config.label_smoothing
                    terms.append((h - 1 / (2 * beta)) ** 2 if config.loss_type == "ipo" else
                                 -(1 - smooth) * logsigmoid(beta * h)
                                 - smooth * logsigmoid(-beta * h))
        prompts.append(torch.stack(terms).mean())
    return torch.stack(prompts).mean()


@pytest.mark.parametrize("settings", [
    {}, {"label_smoothing": 0.2}, {"loss_type": "ipo"}, {"reference": "none"},
    {"max_tokens_per_microbatch": 1}, {"share_prefix": False},
    {"max_tokens_per_microbatch": 40, "loss_type": "ipo"},
], ids=str)
def test_loss_and_gradient_are_those_of_the_formula(settings):
    config, comparisons = make_config(**settings), make_comparisons(6)
    policy, reference = make_policy(), make_policy(seed=1)
    trainer = DPOTrainer(config, policy, comparisons, reference=reference)
    assert len(trainer.examples) == 6
    metrics = trainer.backward(trainer.examples)
    other = make_policy()
    expected = loss_by_hand(other, reference, comparisons, config)
    expected.backward()
    assert metrics["loss/dpo"] == pytest.approx(expected.item(), rel=1e-9)
    for found, wanted in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.allclose(found.grad, wanted.grad, rtol=1e-7, atol=1e-10)


def test_metrics_are_means_over_pairs():
    comparisons, policy, reference = make_comparisons(5), make_policy(), make_policy(seed=1)
    trainer = DPOTrainer(make_config(batch_size=5), policy, comparisons, reference=reference)
    before = copy.deepcopy(policy)
    metrics = trainer.step()
    chosen, rejected, logprobs = [], [], []
    for c in comparisons:
        sums = [[logprob_by_hand(m, c.prompt_ids, ids, False).item() for m in (before, reference)]
                for ids in c.completions]
        rewards = [0.3 * (own - ref) for own, ref in sums]
        pairs = [(i, j) for i in range(len(c.ranks)) for j in range(len(c.ranks))
                 if c.ranks[i] < c.ranks[j]]
        chosen.append(sum(rewards[i] for i, _ in pairs) / len(pairs))
        rejected.append(sum(rewards[j] for _, j in pairs) / len(pairs))
        logprobs.append(sum(sums[i][0] for i, _ in pairs) / len(pairs))
    assert metrics["reward/chosen_mean"] == pytest.approx(sum(chosen) / 5)
    assert metrics["reward/rejected_mean"] == pytest.approx(sum(rejected) / 5)
    assert metrics["reward/margin_mean"] == pytest.approx(
        metrics["reward/chosen_mean"] - metrics["reward/rejected_mean"])
    assert metrics["logprob/chosen_mean"] == pytest.approx(sum(logprobs) / 5)
    assert set(metrics) <= set(GLOSSARY)


def test_without_a_reference_it_is_the_policy_before_the_first_step():
    trainer = DPOTrainer(make_config(), make_policy(), make_comparisons(8))
    first = trainer.step()
    assert first["reward/margin_mean"] == pytest.approx(0, abs=1e-12)
    assert first["loss/dpo"] == pytest.approx(0.6931471805599453)
    assert trainer.step()["reward/margin_mean"] != 0


def test_every_completion_is_read_once():
    comparisons, policy = make_comparisons(6), make_policy()
    trainer = DPOTrainer(make_config(batch_size=6), policy, comparisons, reference=make_policy(1))
    seen = []
    policy.backbone.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    trainer.step()
    tokens = sum(len(c.prompt_ids) * len(c.completions) + sum(map(len, c.completions))
                 for c in comparisons)
    assert sum(seen) <= tokens


def test_recovers_the_optimum_of_a_task_with_one_token():
    """With Bradley-Terry labels of reward r, log pi / ref of one-token answers is r / beta + c."""
    gold = torch.tensor([1.0, 0.2, -0.4, -1.1])
    beta, first = 0.5, 5
    # Every ordered pair as often as the model of the labels says, so that nothing is left to luck.
    comparisons = []
    for i in range(4):
        for j in range(4):
            if i != j:
                count = round(100 * float(torch.sigmoid(gold[i] - gold[j])))
                comparisons += [Comparison((1,), ((first + i,), (first + j,)), (0, 1))] * count
    reference = make_policy(seed=3, dtype=torch.float32)
    policy = copy.deepcopy(reference)
    config = make_config(dpo_beta=beta, learning_rate=1e-2, batch_size=len(comparisons),
                         num_epochs=150, max_grad_norm=None, lr_schedule="linear")
    DPOTrainer(config, policy, comparisons, reference=reference).train()
    with torch.no_grad():
        learned = torch.stack([
            beta * (logprob_by_hand(policy, (1,), (first + i,), False)
                    - logprob_by_hand(reference, (1,), (first + i,), False)) for i in range(4)])
    assert torch.allclose(learned - learned.mean(), gold - gold.mean(), atol=0.05)


def test_equal_seeds_give_equal_runs(tmp_path):
    def run(name):
        config, policy = make_config(seed=4, num_epochs=2, eval_steps=2), make_policy()
        with RunFolder(tmp_path / name, config, stage="dpo") as folder:
            DPOTrainer(config, policy, make_comparisons(9), eval=make_comparisons(3, seed=7),
                       run=folder).train()
        return policy, (tmp_path / name / "metrics.jsonl").read_text("utf-8")

    (one, metrics), (two, again) = run("one"), run("two")
    assert metrics == again and "loss/dpo_eval" in metrics
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_pairs_leave_out_ties_and_weigh_prompts_alike():
    rows = [Comparison((1,), ((2,), (3,), (4,)), (0, 1, 1)), Comparison((1,), ((2,), (3,)), (1, 0))]
    pairs, weights = ranked_pairs(rows)
    assert pairs == [(0, 1), (0, 2), (4, 3)]
    assert weights == [0.5, 0.5, 1.0]


def test_rankings_without_a_pair_or_room_are_counted():
    rows = [*make_comparisons(3), Comparison((1,), ((2,), (3,)), (0, 0)),
            Comparison((1, 2), ((2,) * 30, (3,)), (0, 1)),
            Comparison(tuple(range(9)), ((2,) * 8, (3,)), (0, 1))]
    trainer = DPOTrainer(make_config(max_seq_tokens=12), make_policy(), rows)
    assert (trainer.num_without_pair, trainer.num_too_long, trainer.num_truncated) == (1, 1, 1)
    assert len(trainer.examples) == 4


def test_bad_input_is_refused():
    tie = [Comparison((1,), ((2,), (3,)), (0, 0))]
    with pytest.raises(DataError, match="pair of different ranks: expected at least one row"):
        DPOTrainer(make_config(), make_policy(), tie)
    with pytest.raises(DataError, match="held-out rankings with a pair"):
        DPOTrainer(make_config(), make_policy(), make_comparisons(2), eval=tie)
    with pytest.raises(DataError, match="comparison 0: expected completions of at least one token"):
        DPOTrainer(make_config(), make_policy(), [Comparison((1,), ((2,), ()), (0, 1))])
    with pytest.raises(DataError, match="comparison 0: expected a prompt"):
        DPOTrainer(make_config(), make_policy(), [Comparison((), ((2,), (3,)), (0, 1))])
    for settings, message in [({"dpo_beta": 0}, "dpo_beta"), ({"label_smoothing": 0.5}, "0.5"),
                              ({"label_smoothing": 0.1, "loss_type": "ipo"}, "loss_type ipo"),
                              ({"batch_size": 0}, "batch_size")]:
        with pytest.raises(ConfigError, match=message):
            make_config(**settings)


def test_weights_that_are_not_finite_stop_the_run_before_the_step():
    policy, reference = make_policy(), make_policy(seed=1)
    trainer = DPOTrainer(make_config(), policy, make_comparisons(4), reference=reference)
    with torch.no_grad():
        next(policy.parameters())[0] = float("nan")
    before = copy.deepcopy(policy.state_dict())
    with pytest.raises(NumericsError, match="step 1: expected finite metrics, got"):
        for _ in range(2):
            trainer.backward(trainer.examples)
            trainer.step()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7))
               for a, b in zip(before.values(), policy.state_dict().values(), strict=True))


def test_example_learns(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples/dpo_tiny.py"), run_name="__main__")
    printed = capsys.readouterr().out
    before, after = (float(re.search(rf"{word}: ([0-9.]+)", printed).group(1))
                     for word in ("before", "after"))
    assert after > before + 4
