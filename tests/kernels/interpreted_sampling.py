"""sample_tokens' Triton kernel against the float64 reference; run by test_triton.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import gather_logprobs, sample_tokens
from fastrl.ops.sampling import SampledTokens, sample_tokens_reference, uniforms

NEVER = -math.inf
PLAIN: dict[str, float | bool] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
                                  "greedy": False, "raw_logprobs": False}
KINDS: list[dict[str, Any]] = [
    {}, {"temperature": 0.7}, {"top_k": 7}, {"top_p": 0.6}, {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3}, {"greedy": True},
    {"top_p": 0.5, "raw_logprobs": True}, {"greedy": True, "top_k": 3}, {"top_k": 10**9},
]


def settings_of(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One row of settings for each of `rows`."""
    return {name: torch.tensor([{**PLAIN, **row}[name] for row in rows]) for name in PLAIN}


def run(logits: Tensor, rows: list[dict[str, Any]], positions: Tensor | None = None,
        **options: Any) -> SampledTokens:
    ids = torch.arange(len(logits)) if positions is None else positions
    return sample_tokens(logits, ids * 7 - 5, ids, **settings_of(rows), backend="triton",
                         **options)


def assert_drawn_by_inverse_cdf(logits: Tensor, rows: list[dict[str, Any]], got: SampledTokens,
                                margin: float = 2e-6, **options: Any) -> None:
    """The reference's tokens, or a neighbour whose bounds hold the random number to rounding."""
    ids = torch.arange(len(logits))
    settings = settings_of(rows)
    expected = sample_tokens_reference(logits.double(), ids * 7 - 5, ids, **settings, **options)
    for row in (got.token_ids != expected.token_ids).nonzero().flatten().tolist():
        assert not settings["greedy"][row]
        one = {name: values[row:row + 1].expand(logits.shape[1])
               for name, values in settings.items()}
        assert abs(row_bound(logits[row], one, int(got.token_ids[row]),
                             int(expected.token_ids[row])) - uniforms(
            ids[row:row + 1] * 7 - 5, ids[row:row + 1])) < margin
    same = got.token_ids == expected.token_ids
    assert same.float().mean() > 0.9
    torch.testing.assert_close(got.logprobs[same], expected.logprobs[same], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-5, atol=3e-6)
    assert torch.equal(got.stopped[same], expected.stopped[same])


def row_bound(logits: Tensor, settings: dict[str, Tensor], token: int, other: int) -> Tensor:
    """The cumulative probability between two neighbours of an untruncated row."""
    probs = (logits.double() / settings["temperature"][0]).softmax(dim=0)
    return probs[: max(token, other)].sum()


# One column, less than a block, several tiles with a rest.
@pytest.mark.parametrize("vocab_size", [1, 5, 503, 9001])
def test_every_setting_beside_the_others(vocab_size: int) -> None:
    rows = KINDS if vocab_size < 9000 else KINDS[2:6:3]
    logits = 3 * torch.randn(len(rows), vocab_size)
    assert_drawn_by_inverse_cdf(logits, rows, run(logits, rows))


def test_golden_draw() -> None:
    """Seed 0, position 0: word 6627e8d5, u = 0.39904646. Cumulative: .25, .5, .75, 1."""
    zero = torch.zeros(1, dtype=torch.int64)
    got = sample_tokens(torch.zeros(1, 4), zero, zero, **settings_of([{}]), backend="triton")
    assert got.token_ids.tolist() == [1] and not got.stopped
    assert got.logprobs.item() == pytest.approx(-1.3862944)
    assert got.entropy.item() == pytest.approx(1.3862944)


def test_draws_follow_the_exact_distribution() -> None:
    """Rows of one launch at consecutive positions; 99.9% point of chi-square with 3 degrees."""
    logits = torch.tensor([1.0, 0.0, NEVER, 0.5, -0.5]).expand(120, -1)
    got = run(logits, [{}] * 120)
    expected = logits[0].double().softmax(dim=0) * 120
    counts = torch.bincount(got.token_ids, minlength=5).double()
    possible = expected > 0
    assert not counts[~possible].any()
    assert ((counts - expected)[possible].square() / expected[possible]).sum() <= 16.27


def test_log_probs_are_those_of_gather_logprobs() -> None:
    logits = 4 * torch.randn(6, 300)
    got = run(logits, [{"temperature": 0.8}] * 6)
    logprobs, entropy = gather_logprobs(logits, got.token_ids, temperature=0.8, backend="torch")
    torch.testing.assert_close(got.logprobs, logprobs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.entropy, entropy, rtol=1e-6, atol=1e-6)


def test_rows_do_not_depend_on_each_other() -> None:
    logits = torch.randn(len(KINDS), 300)
    together, ids = run(logits, KINDS), torch.arange(len(KINDS))
    order = ids.flip(0)
    shuffled = run(logits[order], [KINDS[i] for i in order.tolist()], positions=order)
    for row in (2, 3):
        alone = run(logits[row:row + 1], KINDS[row:row + 1], positions=ids[row:row + 1])
        assert all(torch.equal(a, b[row:row + 1]) for a, b in zip(alone, together, strict=True))
    assert all(torch.equal(a, b[order]) for a, b in zip(shuffled, together, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits(dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(len(KINDS), 77)).to(dtype)
    assert_drawn_by_inverse_cdf(logits, KINDS, run(logits, KINDS))


def test_not_contiguous() -> None:
    logits = torch.randn(40, 3).t()
    assert not logits.is_contiguous()
    assert_drawn_by_inverse_cdf(logits, [{"top_p": 0.5}] * 3, run(logits, [{"top_p": 0.5}] * 3))


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e30, -1e30, -3e30], [NEVER, 0.0, NEVER],
                           [1e38, -1e38, 1.0]])
    for kind in ({}, {"top_k": 2, "top_p": 0.999}):
        got = run(logits, [kind] * 4)
        assert got.token_ids[0] == 0 and got.token_ids[1] in (0, 1)
        assert got.token_ids[2] == 1 and got.token_ids[3] == 0
        torch.testing.assert_close(got.logprobs, torch.tensor([0.0, -math.log(2), 0.0, 0.0]))
        torch.testing.assert_close(got.entropy, torch.tensor([0.0, math.log(2), 0.0, 0.0]))


def test_the_last_possible_token_is_reached_but_none_beyond() -> None:
    logits = torch.cat([torch.zeros(60, 2), torch.full((60, 3), NEVER)], dim=1)
    assert run(logits, [{}] * 60).token_ids.unique().tolist() == [0, 1]


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|All-NaN):RuntimeWarning")
def test_nothing_but_minus_infinity_and_nan_stay_inside_the_vocabulary_and_show() -> None:
    logits = torch.full((2, 5), NEVER)
    logits[1] = math.nan
    for kind in ({}, {"top_k": 2, "top_p": 0.5}):
        got = run(logits, [kind] * 2)
        assert ((got.token_ids >= 0) & (got.token_ids < 5)).all()
        assert got.logprobs.isnan().all() and got.entropy.isnan().all()


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.zeros(2, 5000)
    logits[0, [7, 4500]] = 2.0
    logits[1, [4400, 4500]] = 3.0
    assert run(logits, [{"greedy": True}] * 2).token_ids.tolist() == [7, 4400]


def adjustments(num_rows: int, vocab_size: int) -> dict[str, Tensor]:
    """Penalties in half of the rows, stops in all, suppressed in some."""
    ids = torch.arange(num_rows)
    return {"repetition_penalty": torch.where(ids % 2 == 0, 1.7, 1.0),
            "seen": torch.rand(num_rows, vocab_size) < 0.4,
            "stop_token_ids": torch.stack([ids % vocab_size, torch.full_like(ids, -1),
                                           (ids * 3) % vocab_size], dim=1),
            "suppresses_stops": ids % 3 == 0}


def test_penalty_stops_and_their_suppression() -> None:
    rows = [{**kind, "raw_logprobs": i % 4 == 0} for i, kind in enumerate(KINDS * 2)]
    logits = 2 * torch.randn(len(rows), 9)
    options = adjustments(len(rows), 9)
    got = run(logits, rows, **options)
    assert_drawn_by_inverse_cdf(logits, rows, got, **options)
    is_stop = (got.token_ids[:, None] == options["stop_token_ids"]).any(dim=1)
    assert torch.equal(got.stopped, is_stop) and is_stop.any()
    assert not (is_stop & options["suppresses_stops"]).any()


def test_without_truncation_by_word_of_the_caller() -> None:
    logits = torch.randn(4, 50)
    for got, expected in zip(run(logits, [{}] * 4, is_truncated=False), run(logits, [{}] * 4),
                             strict=True):
        assert torch.equal(got, expected)


def arguments(logits: Tensor) -> tuple[Any, ...]:
    ids = torch.arange(len(logits))
    adjusted = adjustments(*logits.shape)
    return (logits, ids, ids, *settings_of(KINDS[:len(logits)]).values(), *adjusted.values(), True)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastrl_kernels.sample_tokens, arguments(torch.randn(3, 20)))


def test_compiles_to_one_graph() -> None:
    logits = torch.randn(3, 20)

    def call(logits: Tensor) -> SampledTokens:
        return run(logits, KINDS[1:4])

    got = torch.compile(call, fullgraph=True, backend="aot_eager")(logits)
    for one, expected in zip(got, call(logits), strict=True):
        assert torch.equal(one, expected)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        run(torch.zeros(1, 4, dtype=torch.float64), [{}])
