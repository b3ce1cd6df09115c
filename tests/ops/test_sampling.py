"""sample_tokens: random numbers against published vectors, draws against exact distributions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.errors import BackendUnavailableError, ShapeError
from fastrl.ops.sampling import (
    SampledTokens,
    philox,
    request_seeds,
    sample_tokens,
    sample_tokens_reference,
    uniforms,
)

NEVER = -math.inf


def _settings(batch_size: int, **changes: float | bool) -> dict[str, Tensor]:
    values: dict[str, float | bool] = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "greedy": False,
        "raw_logprobs": False, **changes}
    return {name: torch.full((batch_size,), value) for name, value in values.items()}


def _draw(logits: Tensor, seed: int = 0, **changes: Any) -> SampledTokens:
    positions = torch.arange(len(logits))
    return sample_tokens(logits, torch.full_like(positions, seed), positions,
                         **_settings(len(logits), **changes))


# Known-answer vectors of Random123 1.14 (tests/kat_vectors, philox4x32-10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    def words(text: str) -> Tensor:
        return torch.tensor([int(word, 16) for word in text.split()])[:, None].expand(-1, 3)

    assert torch.equal(philox(words(key), words(counter)), words(expected))


def test_uniforms_are_inside_the_open_interval_and_uniform() -> None:
    seeds = torch.tensor([-1, 0, 2**62]).repeat_interleave(20000)
    drawn = uniforms(seeds, torch.arange(20000).repeat(3))
    assert drawn.dtype == torch.float64 and 0 < drawn.min() and drawn.max() < 1
    assert drawn.unique().numel() > 59990  # 32-bit words, some meet
    counts = torch.histc(drawn, 50, 0, 1)
    assert ((counts - 1200).square() / 1200).sum() < 85.4  # chi-square, 49 degrees, p = 0.001


def test_uniforms_change_with_every_bit_of_seed_and_position() -> None:
    bits = 1 << torch.arange(63)
    zeros = torch.zeros_like(bits)
    drawn = torch.cat([uniforms(bits, zeros), uniforms(zeros, bits), uniforms(zeros, zeros)[:1]])
    assert drawn.unique().numel() == 127


def test_request_seeds_differ_by_run_and_request_and_from_the_token_stream() -> None:
    ids = torch.arange(1000)
    seeds = torch.cat([request_seeds(0, ids), request_seeds(1, ids), request_seeds(2**40, ids)])
    assert seeds.unique().numel() == 3000
    assert torch.equal(request_seeds(0, ids[5:6]), request_seeds(0, ids)[5:6])
    assert request_seeds(0, torch.zeros(1).long()).tolist() != [0xE169C58D6627E8D5 - 2**64]


LOGITS = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.0, -1.0, -1.0, NEVER, -3.0, 1.0])


def _exact(logits: list[float], kept: list[int]) -> list[float]:
    total = sum(math.exp(logits[v]) for v in kept)
    return [math.exp(logits[v]) / total if v in kept else 0.0 for v in range(len(logits))]


# What is kept of LOGITS is worked out by hand. Tokens 1, 2 and 9 tie.
@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1, 2, 9]),  # ties with the second are kept
        ({"top_k": 5}, [0, 1, 2, 3, 9]),
        ({"top_k": 999}, [0, 1, 2, 3, 4, 5, 6, 8, 9]),
        ({"top_p": 0.3}, [0]),  # p_0 = 0.389
        ({"top_p": 0.4}, [0, 1, 2, 9]),  # one of the ties is needed, so all are kept
        ({"top_p": 0.85}, [0, 1, 2, 3, 9]),  # 0.819 with the ties
        ({"top_k": 4, "top_p": 0.45}, [0]),  # of the four that are left, p_0 = 0.475
        ({"min_p": 0.2}, [0, 1, 2, 3, 9]),  # exp(-1.5) = 0.223, exp(-2) = 0.135
        ({"top_k": 4, "min_p": 0.5}, [0]),  # exp(-1) = 0.368
    ],
)
def test_draws_follow_the_exact_distribution(
    changes: dict[str, Any], kept: list[int]
) -> None:
    num_draws = 20000
    token_ids, logprobs, entropy, _ = _draw(LOGITS.expand(num_draws, -1), seed=11, **changes)
    exact = _exact((LOGITS / changes.get("temperature", 1.0)).tolist(), kept)
    counts = torch.bincount(token_ids, minlength=10).double()
    expected = torch.tensor(exact, dtype=torch.float64) * num_draws
    assert not counts[expected == 0].any()
    possible = expected > 0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum()
    # 99.9% points of chi-square with 1, 3, 4 and 8 degrees of freedom.
    limit = {1: 1e-9, 4: 16.27, 5: 18.47, 9: 26.12}[len(kept)]
    assert statistic <= limit
    torch.testing.assert_close(logprobs, torch.tensor(exact).log()[token_ids].float())
    nats = -sum(p * math.log(p) for p in exact if p > 0)
    torch.testing.assert_close(entropy, torch.full_like(entropy, nats))


def test_golden_draw() -> None:
    # Seed 0, position 0: word 6627e8d5, u = 0.39904646. Cumulative: .25, .5, .75, 1.
    token_ids, logprobs, entropy, _ = _draw(torch.zeros(1, 4))
    assert token_ids.tolist() == [1]
    assert logprobs.item() == pytest.approx(-1.3862944)
    assert entropy.item() == pytest.approx(1.3862944)


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.7}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05},
     {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3}, {"greedy": True},
     {"top_p": 0.5, "raw_logprobs": True}, {"greedy": True, "top_k": 3}],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [1, 5, 503])
def test_equals_reference(vocab_size: int, changes: dict[str, Any]) -> None:
    logits = 3 * torch.randn(64, vocab_size, generator=torch.Generator().manual_seed(2))
    seeds, positions = torch.arange(64) - 32, torch.arange(64) ** 2
    settings = _settings(64, **changes)
    token_ids, logprobs, entropy, _ = sample_tokens(logits, seeds, positions, **settings)
    expected = sample_tokens_reference(logits.double(), seeds, positions, **settings)
    assert torch.equal(token_ids, expected[0])
    torch.testing.assert_close(logprobs, expected[1], rtol=0, atol=2e-6)
    torch.testing.assert_close(entropy, expected[2], rtol=1e-5, atol=2e-6)


def test_rows_may_differ_in_settings_and_do_not_depend_on_each_other() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(4))
    choices = [{}, {"top_k": 3}, {"top_p": 0.4}, {"min_p": 0.3}, {"greedy": True}]
    rows = [_settings(1, **choices[i % 5]) for i in range(40)]
    settings = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    seeds = torch.arange(40)
    together = sample_tokens(logits, seeds, seeds, **settings)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
    shuffled = sample_tokens(logits[order], seeds[order], seeds[order],
                             **{name: values[order] for name, values in settings.items()})
    for row in range(40):
        alone = sample_tokens(logits[row : row + 1], seeds[row : row + 1], seeds[row : row + 1],
                              **rows[row])
        assert alone[0] == together[0][row]
        assert alone[1] == together[1][row]
    for values, expected in zip(shuffled, together, strict=True):
        assert torch.equal(values, expected[order])


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    token_ids, _, _, _ = _draw(torch.tensor([[0.0, 2.0, 2.0, 2.0], [3.0, 1.0, 3.0, NEVER]]),
                            greedy=True)
    assert token_ids.tolist() == [1, 0]


def test_raw_logprobs_ignore_truncation_but_not_temperature() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    token_ids, logprobs, entropy, _ = _draw(logits, top_k=1, temperature=2.0, raw_logprobs=True)
    assert token_ids.item() == 0
    assert logprobs.item() == pytest.approx(-0.6802697)  # -log(1 + e^-0.5 + e^-1)
    assert entropy.item() == 0


def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens() -> None:
    logits, seen = torch.tensor([[2.0, -1.0, 1.0]]), torch.tensor([[True, True, False]])
    options = {"repetition_penalty": torch.tensor([2.0]), "seen": seen}
    zero = torch.zeros(1, dtype=torch.int64)
    settings = _settings(1, greedy=True)
    token_ids, logprobs, entropy, _ = sample_tokens(logits, zero, zero, **settings, **options)
    exact = torch.tensor([1.0, -2.0, 1.0]).log_softmax(0)  # 2 / 2 and -1 * 2
    assert token_ids.item() == 0 and logprobs.item() == pytest.approx(exact[0].item())
    assert entropy.item() == pytest.approx(-(exact.exp() * exact).sum().item())
    settings["raw_logprobs"][:] = True
    raw = sample_tokens(logits, zero, zero, **settings, **options).logprobs
    assert raw.item() == pytest.approx(logits[0].log_softmax(0)[0].item())


def test_stop_tokens_set_the_flag_or_are_never_drawn() -> None:
    rows = 400
    logits = torch.tensor([0.0, 1.0, 0.5, -0.5]).expand(rows, -1)
    stops = torch.tensor([[1, -1, 99]]).expand(rows, -1)  # none, and one beyond the vocabulary
    suppresses = torch.arange(rows) % 2 == 0
    ids = torch.arange(rows)
    got = sample_tokens(logits, ids, ids, **_settings(rows), stop_token_ids=stops,
                        suppresses_stops=suppresses)
    assert torch.equal(got.stopped, got.token_ids == 1) and 50 < got.stopped.sum() < 150
    assert not got.stopped[suppresses].any()
    exact = logits[0, [0, 2, 3]].log_softmax(0)[0]
    torch.testing.assert_close(got.logprobs[suppresses & (got.token_ids == 0)],
                               exact.expand(int((suppresses & (got.token_ids == 0)).sum())))
    assert not _draw(logits).stopped.any()


def test_adjustments_equal_the_reference() -> None:
    ids = torch.arange(60)
    logits = 2 * torch.randn(60, 11, generator=torch.Generator().manual_seed(3))
    options = {
        "repetition_penalty": torch.where(ids % 2 == 0, 1.7, 1.0),
        "seen": torch.rand(60, 11, generator=torch.Generator().manual_seed(4)) < 0.4,
        "stop_token_ids": torch.stack([ids % 11, torch.full_like(ids, -1)], dim=1),
        "suppresses_stops": ids % 3 == 0}
    settings = _settings(60, top_p=0.9, temperature=0.8)
    settings["raw_logprobs"] = ids % 4 == 0
    got = sample_tokens(logits, ids, ids, **settings, **options)
    expected = sample_tokens_reference(logits, ids, ids, **settings, **options)
    assert torch.equal(got.token_ids, expected.token_ids)
    assert torch.equal(got.stopped, expected.stopped)
    torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits(scale: float) -> None:
    logits = scale * torch.tensor([[1.0, -1.0, 0.0], [-1.0, -1.0, -3.0], [NEVER, 0.0, NEVER]])
    logits = logits.nan_to_num(nan=0.0, neginf=NEVER, posinf=scale)
    token_ids, logprobs, entropy, _ = _draw(logits)
    assert token_ids[0] == 0 and token_ids[1] in (0, 1) and token_ids[2] == 1
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -math.log(2), 0.0]))
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(2), 0.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    logits = torch.randn(8, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    token_ids, logprobs, entropy, _ = _draw(logits)
    expected = _draw(logits.double())
    assert torch.equal(token_ids, expected[0])
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected[1])


@pytest.mark.parametrize("vocab_size", [50257, 151936])
def test_large_vocabularies(vocab_size: int) -> None:
    logits = torch.randn(6, vocab_size, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(6)
    for changes in ({}, {"top_k": 50, "top_p": 0.9}):
        settings = _settings(6, **changes)
        token_ids, logprobs, _, _ = sample_tokens(logits, rows, rows, **settings)
        expected = sample_tokens_reference(logits, rows, rows, **settings)
        assert torch.equal(token_ids, expected[0])
        torch.testing.assert_close(logprobs, expected[1], rtol=1e-5, atol=1e-5)


def test_the_last_possible_token_is_reached_but_none_beyond() -> None:
    # Ends in tokens of probability 0, which no draw may return however close u is to 1.
    logits = torch.cat([torch.zeros(3000, 2), torch.full((3000, 3), NEVER)], dim=1)
    assert _draw(logits)[0].unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(4)}, "logits"),
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, "floating type"),
        ({"logits": torch.zeros(2, 0)}, "V at least 1"),
        ({"seeds": torch.zeros(3, dtype=torch.int64)}, "seeds"),
        ({"positions": torch.zeros(2)}, "positions"),
        ({"top_p": torch.ones(1)}, "top_p"),
        ({"greedy": torch.zeros(2)}, "greedy"),
        ({"top_k": torch.zeros(2)}, "top_k torch.int64"),
        ({"repetition_penalty": torch.ones(2)}, "repetition_penalty and seen together"),
        ({"repetition_penalty": torch.ones(2), "seen": torch.zeros(2, 3).bool()}, "seen"),
        ({"stop_token_ids": torch.zeros(2, dtype=torch.int64)}, "stop_token_ids"),
        ({"suppresses_stops": torch.zeros(2).bool()}, "expected stop_token_ids"),
    ],
)
def test_bad_input(change: dict[str, Tensor], message: str) -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    arguments: dict[str, Any] = {"logits": torch.zeros(2, 4), "seeds": zeros, "positions": zeros}
    with pytest.raises(ShapeError, match=message):
        sample_tokens(**(arguments | _settings(2) | change))


@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_no_rows(vocab_size: int) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    drawn = sample_tokens(torch.zeros(0, vocab_size), none, none, **_settings(0, top_k=3))
    assert [x.shape for x in drawn] == [(0,)] * 4


def test_draws_have_no_gradient() -> None:
    zeros = torch.zeros(2, dtype=torch.int64)
    drawn = sample_tokens(torch.zeros(2, 4, requires_grad=True), zeros, zeros, **_settings(2))
    assert not any(x.requires_grad for x in drawn)


def test_a_backend_that_is_not_there_is_refused() -> None:
    zeros = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(BackendUnavailableError, match="sample_tokens"):
        sample_tokens(torch.zeros(1, 4), zeros, zeros, **_settings(1), backend="cuda")
