"""Data order, seeds, microbatches, packed forwards, devices and guards shared by the trainers."""

import math

import pytest
import torch

from fastrl.errors import ConfigError, DataError, NumericsError
from fastrl.models import DecoderConfig, new_decoder
from fastrl.trainers.common import (
    SilentProgress,
    accumulate,
    backward_token_loss,
    check_example,
    check_finite,
    derive_seed,
    epoch_batches,
    epoch_permutation,
    evaluate_token_loss,
    mode,
    packed_forward,
    require_rows,
    resolve_device,
    resolve_dtype,
    seeded,
    stream_indices,
    token_loss,
)
from fastrl.types import TokenExample

DECODER = DecoderConfig(
    family="llama", vocab_size=17, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2,
    num_kv_heads=1, head_dim=8, max_positions=64, rotary_dim=8, initializer_range=0.2)


def make_model(dtype=torch.float64, seed=0):
    return new_decoder(DECODER, seed).to(dtype)


def make_examples(count, seed=0, vocab=17):
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for _ in range(count):
        n = int(torch.randint(2, 12, (), generator=generator))
        tokens = torch.randint(vocab, (n,), generator=generator).tolist()
        prompt = int(torch.randint(1, n, (), generator=generator))
        examples.append(TokenExample(tuple(tokens), (False,) * prompt + (True,) * (n - prompt)))
    return examples


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own():
    batches = epoch_batches(10, 4, seed=3, epoch=0)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert sorted(i for b in batches for i in b) == list(range(10))
    assert epoch_permutation(10, 3, 0) == [i for b in batches for i in b]
    assert epoch_permutation(10, 3, 1) != epoch_permutation(10, 3, 0)
    assert epoch_permutation(10, 4, 0) != epoch_permutation(10, 3, 0)
    epoch_permutation(10, 3, 0).clear()  # a caller's change does not reach the next caller
    assert len(epoch_permutation(10, 3, 0)) == 10


def test_stream_continues_where_it_stopped():
    whole = stream_indices(5, seed=1, begin=0, count=17)
    parts = stream_indices(5, 1, 0, 3) + stream_indices(5, 1, 3, 9) + stream_indices(5, 1, 12, 5)
    assert whole == parts
    assert sorted(whole[:5]) == sorted(whole[5:10]) == sorted(whole[10:15]) == list(range(5))
    assert stream_indices(5, 1, 4, 0) == []


def test_derived_seeds_differ_by_every_part():
    seeds = {derive_seed(0), derive_seed(1), derive_seed(0, "a"), derive_seed(0, "b"),
             derive_seed(0, "a", 1), derive_seed(0, "a", 2), derive_seed(0, "a/1")}
    assert len(seeds) == 6  # "a", 1 and "a/1" name the same purpose
    assert all(0 <= s < 2**63 for s in seeds)
    assert derive_seed(0, "order", 0) == 3955691223199900983


def test_seeded_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with seeded(9, torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(torch.rand(2), expected)
    with seeded(9, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)


def test_mode_is_restored_after_an_error():
    model = torch.nn.Linear(1, 1).train()
    with pytest.raises(ZeroDivisionError), mode(model, train=False):
        assert not model.training
        raise ZeroDivisionError
    assert model.training


def test_packed_forward_equals_sequences_alone():
    model, sequences = make_model(), [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    hidden, batch = packed_forward(model, sequences)
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    alone = torch.cat([packed_forward(model, [s])[0] for s in sequences])
    torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-12)


@torch.no_grad()
def test_token_loss_is_the_mean_of_torch_cross_entropy():
    model, examples = make_model(), make_examples(5)
    losses = []
    for e in examples:
        logits = packed_forward(model, [e.token_ids])[0] @ model.lm_head.weight.T
        entropy = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(e.token_ids[1:]), reduction="none")
        losses += entropy[torch.tensor(e.loss_mask[1:])].tolist()
    assert float(token_loss(model, examples, len(losses))) == pytest.approx(
        math.fsum(losses) / len(losses), rel=1e-12)
    assert evaluate_token_loss(model, examples, 7) == pytest.approx(
        math.fsum(losses) / len(losses), rel=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("max_tokens", [1, 7, 20, 10_000])
def test_token_budget_changes_neither_loss_nor_gradients(dtype, tolerance, max_tokens):
    examples = make_examples(9)
    whole, split = make_model(dtype), make_model(dtype)
    expected = backward_token_loss(whole, examples, 10**9)
    found = backward_token_loss(split, examples, max_tokens)
    assert found == pytest.approx(expected, rel=tolerance)
    for a, b in zip(whole.parameters(), split.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * a.grad.norm()


def test_weight_scales_the_gradient_not_the_loss():
    examples = make_examples(3)
    plain, weighted = make_model(), make_model()
    assert backward_token_loss(plain, examples, 10) == backward_token_loss(
        weighted, examples, 10, weight=2.5)
    for a, b in zip(plain.parameters(), weighted.parameters(), strict=True):
        torch.testing.assert_close(2.5 * a.grad, b.grad)


def test_accumulate_splits_by_tokens():
    weight = torch.nn.Parameter(torch.tensor(2.0))
    seen = []

    def share(rows):
        seen.append(rows)
        return weight * len(rows)

    assert float(accumulate([3, 3, 9, 1], 6, share)) == 8.0
    assert seen == [[0, 1], [2], [3]] and float(weight.grad) == 4.0


def test_evaluation_leaves_mode_and_gradients():
    model = make_model().train()
    evaluate_token_loss(model, make_examples(2), 10)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_bad_examples_are_refused():
    with pytest.raises(DataError, match="got 1 flags for 2 tokens"):
        check_example(TokenExample((1, 2), (False,)), 0)
    with pytest.raises(DataError, match="nothing predicts the first token"):
        check_example(TokenExample((1, 2), (True, True)), 0)
    with pytest.raises(DataError, match="expected target tokens, got none in 1"):
        backward_token_loss(make_model(), [TokenExample((1, 2), (False, False))], 10)
    with pytest.raises(DataError, match="SFT data: expected at least one row"):
        require_rows([], "SFT data")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_names_step_and_metric(value):
    check_finite(1, {"loss/train": 1.0})
    with pytest.raises(NumericsError, match="step 4: expected a finite grad/norm"):
        check_finite(4, {"loss/train": 1.0, "grad/norm": value})


def test_device_and_dtype_names():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("tpu", "cuda:x", "cuda:99"):
        with pytest.raises(ConfigError, match="device: expected"):
            resolve_device(name)
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert resolve_dtype("float64", torch.device("cpu")) == torch.float64
    with pytest.raises(ConfigError, match="dtype: expected"):
        resolve_dtype("float16", torch.device("cpu"))


def test_silent_progress_says_nothing(capsys):
    SilentProgress().update(1, {"loss/train": 1.0})
    assert capsys.readouterr() == ("", "")
