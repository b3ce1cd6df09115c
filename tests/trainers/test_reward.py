"""Reward models: all pairs from one forward per completion, ties, shift, report, recovery."""

import json
import math

import pytest
import torch

from fastrl.config import RewardConfig
from fastrl.errors import DataError, NumericsError
from fastrl.glossary import GLOSSARY
from fastrl.metrics import RunFolder
from fastrl.models import DecoderConfig, new_decoder, scalar_from_causal
from fastrl.models.scoring import sequence_scores
from fastrl.trainers.common import packed_forward
from fastrl.trainers.rankings import comparison_sequences, fit_comparisons
from fastrl.trainers.reward import RewardTrainer, backward_ranking_loss
from fastrl.types import Comparison, TokenExample

VOCAB = 17


DECODER = DecoderConfig(
    family="llama", vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_positions=64, rotary_dim=8, initializer_range=0.2)


def make_model(dtype=torch.float32, seed=0):
    return scalar_from_causal(new_decoder(DECODER, seed), seed=seed).to(dtype)


def make_config(**changes):
    return RewardConfig(**(dict(learning_rate=1e-3, batch_size=4, num_epochs=1) | changes))


def make_comparisons(count, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    comparisons = []
    for index in range(count):
        k = draw(2, 6)
        completions = tuple(tuple(draw(0, VOCAB) for _ in range(draw(1, 7))) for _ in range(k))
        ranks = torch.randperm(k, generator=generator).tolist()
        if ties and k > 2:
            ranks[0] = ranks[1]
        comparisons.append(Comparison(tuple(draw(0, VOCAB) for _ in range(draw(1, 5))), completions,
                                      tuple(ranks), source="ab"[index % 2]))
    return comparisons


@torch.no_grad()
def scores_of(model, comparison):
    values, batch = packed_forward(model, comparison_sequences(comparison))
    return values[batch.cu_seqlens[1:] - 1]


def loss_by_hand(model, comparisons, ties):
    """The formula, one pair at a time."""
    prompts = []
    for c in comparisons:
        scores, terms = scores_of(model, c), []
        pairs = [(i, j) for i in range(len(c.ranks)) for j in range(i)]
        for i, j in pairs:
            if c.ranks[i] != c.ranks[j]:
                w, l = (i, j) if c.ranks[i] < c.ranks[j] else (j, i)  # noqa: E741
                terms.append(-torch.nn.functional.logsigmoid(scores[w] - scores[l]).item())
        prompts.append(sum(terms) / (len(terms) if ties == "kept_pairs" else len(pairs)))
    return sum(prompts) / len(prompts)


@pytest.mark.parametrize("ties", ["kept_pairs", "all_pairs"])
def test_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(ties):
    model, comparisons = make_model(torch.float64), make_comparisons(7, ties=True)
    metrics = backward_ranking_loss(model, comparisons, make_config(ties=ties))
    assert metrics["loss/ranking"] == pytest.approx(loss_by_hand(model, comparisons, ties),
                                                    rel=1e-10)


def test_tie_modes_divide_by_two_or_three_pairs():
    tied = [Comparison((1,), ((2,), (3,), (4,)), (0, 1, 1), source="a") for _ in range(3)]
    kept, everything = (backward_ranking_loss(make_model(), tied, make_config(ties=ties))
                        for ties in ("kept_pairs", "all_pairs"))
    assert kept["loss/ranking"] == pytest.approx(1.5 * everything["loss/ranking"], rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("max_tokens", [1, 30, 70])
def test_token_budget_changes_neither_loss_nor_gradients(dtype, tolerance, max_tokens):
    comparisons = make_comparisons(8, ties=True)
    whole, split = make_model(dtype), make_model(dtype)
    expected = backward_ranking_loss(whole, comparisons, make_config())
    found = backward_ranking_loss(split, comparisons,
                                  make_config(max_tokens_per_microbatch=max_tokens))
    assert found == pytest.approx(expected, rel=tolerance)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * max(a.grad.norm(), 1e-12)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_one_forward_per_completion_and_one_per_prompt(share_prefix):
    model, comparisons = make_model(), make_comparisons(6)
    seen = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    config = make_config(batch_size=6, max_tokens_per_microbatch=40, share_prefix=share_prefix,
                         shift_to_demonstrations=False)
    trainer = RewardTrainer(config, model, comparisons)
    trainer.step()
    prompts = sum(len(c.prompt_ids) * (1 if share_prefix else len(c.completions))
                  for c in comparisons)
    # Every completion once, although it is in K - 1 pairs.
    tokens = prompts + sum(len(s) for c in comparisons for s in c.completions)
    assert sum(map(len, seen)) == tokens
    assert 1 < len(seen) <= 6  # never more passes than prompts
    apart = sum(len(s) for c in comparisons for s in comparison_sequences(c))
    for run in (trainer.shift, lambda: trainer.evaluate(comparisons)):
        seen.clear()
        run()  # a prompt that does not fit into one pass with all completions is read again
        assert tokens <= sum(map(len, seen)) < apart + (not share_prefix)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_shared_prompt_changes_neither_loss_nor_gradients(dtype, tolerance):
    comparisons = make_comparisons(8, ties=True)
    apart, shared = make_model(dtype), make_model(dtype)
    expected = backward_ranking_loss(apart, comparisons, make_config(share_prefix=False))
    found = backward_ranking_loss(shared, comparisons, make_config())
    assert found == pytest.approx(expected, rel=tolerance)
    for a, b in zip(apart.parameters(), shared.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * a.grad.norm()


def test_metrics_of_a_step():
    model = make_model(torch.float64)
    comparisons = make_comparisons(4)
    margins = []
    for c in comparisons:
        scores = scores_of(model, c)
        margins += [float(scores[i] - scores[j]) for i in range(len(c.ranks))
                    for j in range(len(c.ranks)) if c.ranks[i] < c.ranks[j]]
    metrics = RewardTrainer(make_config(), model, comparisons).step()
    assert metrics["reward/accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert metrics["reward/margin_mean"] == pytest.approx(sum(margins) / len(margins))


def gold_comparisons(gold, count, k, seed):
    """Plackett-Luce rankings of k of the completions; its pairs follow Bradley-Terry."""
    generator = torch.Generator().manual_seed(seed)
    comparisons = []
    for _ in range(count):
        prompt = int(torch.randint(len(gold), (), generator=generator))
        chosen = torch.randperm(gold.shape[1], generator=generator)[:k]
        noise = -torch.log(-torch.log(torch.rand(k, generator=generator).clamp_min(1e-9)))
        order = (gold[prompt, chosen] + noise).argsort(descending=True).argsort()
        comparisons.append(Comparison((prompt,), tuple((int(c) + 5,) for c in chosen),
                                      tuple(order.tolist())))
    return comparisons


def test_recovers_gold_scores_from_bradley_terry_labels():
    gold = 1.5 * torch.randn(4, 8, generator=torch.Generator().manual_seed(3))
    model = make_model()
    config = make_config(learning_rate=5e-3, batch_size=64, num_epochs=2)
    RewardTrainer(config, model, gold_comparisons(gold, 3000, 4, seed=1)).train()
    learned = sequence_scores(model, [(p, c + 5) for p in range(4) for c in range(8)], 1000)
    learned = learned.reshape(4, 8).double()
    learned, centred = (x - x.mean(dim=1, keepdim=True) for x in (learned, gold.double()))
    correlation = torch.corrcoef(torch.stack([learned.flatten(), centred.flatten()]))[0, 1]
    slope = (learned * centred).sum() / (centred * centred).sum()
    assert correlation > 0.98
    assert 0.8 < slope < 1.2  # the scale too: log-odds, not only the order


def test_equal_seeds_are_bit_equal():
    runs = []
    for seed in (0, 0, 1):
        model = make_model()
        trainer = RewardTrainer(make_config(seed=seed, num_epochs=2), model, make_comparisons(9))
        trainer.train()
        runs.append([p.detach() for p in (*model.parameters(), model.head.bias)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))


DEMONSTRATIONS = [TokenExample((1, 2, 3), (False, True, True)),
                  TokenExample((4, 5), (False, True)), TokenExample((6,) * 9, (False,) * 9)]


def test_shift_gives_demonstrations_mean_zero(tmp_path):
    model, comparisons = make_model(), make_comparisons(8)
    with RunFolder(tmp_path / "run", make_config(), stage="reward") as run:
        RewardTrainer(make_config(), model, comparisons, demonstrations=DEMONSTRATIONS,
                      run=run).train()
    scores = sequence_scores(model, [e.token_ids for e in DEMONSTRATIONS], 100)
    assert float(scores.double().mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(model.head.bias) != 0.0
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["reward_shift"]
    assert facts["mean_zero_on"] == "demonstrations" and facts["count"] == 3
    assert facts["bias"] == float(model.head.bias)


@pytest.mark.parametrize("demonstrations, on", [((), True), (DEMONSTRATIONS, False)])
def test_without_demonstrations_training_completions_get_mean_zero(tmp_path, demonstrations, on):
    model, comparisons = make_model(), make_comparisons(8)
    config = make_config(shift_to_demonstrations=on)
    with RunFolder(tmp_path / "run", config, stage="reward") as run:
        RewardTrainer(config, model, comparisons, demonstrations=demonstrations, run=run).train()
    scores = torch.cat([scores_of(model, c) for c in comparisons])
    assert float(scores.double().mean()) == pytest.approx(0.0, abs=1e-6)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["reward_shift"]
    assert facts["mean_zero_on"] == "training completions"


def test_a_second_shift_changes_nothing():
    trainer = RewardTrainer(make_config(), make_model(), make_comparisons(4))
    assert trainer.shift() == pytest.approx(trainer.shift(), abs=1e-6)


def test_report_agrees_with_scores_and_is_written(tmp_path):
    model, held = make_model(), make_comparisons(12, seed=5, ties=True)
    with RunFolder(tmp_path / "run", make_config(), stage="reward") as run:
        trainer = RewardTrainer(make_config(), model, make_comparisons(4), run=run)
        report = trainer.evaluate(held)
    right = total = 0
    for c in held:
        scores = scores_of(model, c)
        for i in range(len(c.ranks)):
            for j in range(len(c.ranks)):
                if c.ranks[i] < c.ranks[j]:
                    right, total = right + int(scores[i] > scores[j]), total + 1
    assert report.overall.num_pairs == total
    assert report.overall.accuracy == pytest.approx(right / total)
    assert set(report.by_source) == {"a", "b"}
    saved = json.loads((tmp_path / "run" / "reward_report.json").read_text())
    assert saved["overall"]["accuracy"] == report.overall.accuracy
    assert saved["overall"]["length_rule"] in ("longer", "shorter")


def test_train_evaluates_logs_known_names_and_reports_progress(tmp_path):
    heard = []

    class Progress:
        def update(self, step, metrics):
            heard.append((step, dict(metrics)))

    config = make_config(num_epochs=2, eval_steps=3, logging_steps=2)
    with RunFolder(tmp_path / "run", config, stage="reward") as run:
        RewardTrainer(config, make_model(), make_comparisons(8), run=run,
                      eval=make_comparisons(4, seed=1)).train(Progress())
    assert [step for step, _ in heard] == [1, 2, 3, 4]
    assert [step for step, m in heard if "reward/accuracy_eval" in m] == [3, 4]
    assert "reward/bias" in heard[-1][1]
    assert {name for _, metrics in heard for name in metrics} <= GLOSSARY.keys()
    rows = [json.loads(r) for r in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [2, 3, 4]
    assert (tmp_path / "run" / "reward_report.json").exists()


def test_rankings_without_a_pair_are_dropped_and_counted():
    tied = Comparison((1,), ((2,), (3,)), (0, 0))
    single = Comparison((1,), ((2,),), (0,))
    trainer = RewardTrainer(make_config(), make_model(), [*make_comparisons(3), tied, single])
    assert trainer.num_without_pair == 2 and len(trainer.comparisons) == 3
    with pytest.raises(DataError, match="rankings with a pair of different ranks"):
        RewardTrainer(make_config(), make_model(), [tied, single])
    with pytest.raises(DataError, match="held-out rankings with a pair"):
        RewardTrainer(make_config(), make_model(), make_comparisons(3), eval=[tied])


def test_long_prompts_lose_their_beginning_for_all_completions():
    c = Comparison((1, 2, 3, 4), ((5,), (6, 7)), (0, 1))
    fits, cut, too_long = fit_comparisons([c], 6), fit_comparisons([c], 4), fit_comparisons([c], 2)
    assert fits == ([c], 0) and too_long == ([], 0)
    assert cut[1] == 1 and cut[0][0].prompt_ids == (3, 4)
    trainer = RewardTrainer(make_config(max_seq_tokens=4), make_model(),
                            [c, Comparison((1,), ((2,) * 4, (3,)), (0, 1))],
                            demonstrations=[TokenExample((1,) * 9, (False,) * 9)])
    assert (trainer.num_truncated, trainer.num_too_long) == (1, 1)
    assert trainer.demonstrations == [(1, 1, 1, 1)]
    assert trainer.evaluate([c, Comparison((1,), ((2,) * 4, (3,)), (0, 1))]).num_too_long == 1


@pytest.mark.parametrize("bad, message", [
    (Comparison((1,), ((2,), (3,)), (0,)), "comparison 0: expected one rank"),
    (Comparison((), ((2,), (3,)), (0, 1)), "comparison 0: expected a prompt"),
])
def test_malformed_comparisons_are_refused(bad, message):
    with pytest.raises(DataError, match=message):
        RewardTrainer(make_config(), make_model(), [bad])


def test_nan_stops_before_the_weights_change():
    model = make_model()
    trainer = RewardTrainer(make_config(), model, make_comparisons(4))
    with torch.no_grad():
        model.head.weight[0] = math.nan
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NumericsError, match="step 1: expected finite metrics, got loss/ranking"):
        trainer.step()
    for a, b in zip(before, model.parameters(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
