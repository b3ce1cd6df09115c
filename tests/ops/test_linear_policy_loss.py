"""linear_policy_loss: equals autograd through stored logits, for any chunking and any split."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrl.errors import ConfigError, ShapeError
from fastrl.ops import PolicyStats, linear_logprobs, linear_policy_loss, policy_loss
from fastrl.ops.linear_policy_loss import linear_policy_loss_reference


class Case:
    """One set of inputs; ratios on both sides of the clip, a third of the tokens masked."""

    def __init__(self, M: int = 23, D: int = 5, V: int = 11,
                 dtype: torch.dtype = torch.float64) -> None:
        self.hidden = torch.randn(M, D, dtype=dtype).requires_grad_()
        self.weight = torch.randn(V, D, dtype=dtype).requires_grad_()
        self.bias = torch.randn(V, dtype=dtype).requires_grad_()
        self.token_ids = torch.randint(V, (M,))
        with torch.no_grad():
            logprobs, _ = linear_logprobs(self.hidden, self.weight, self.token_ids, bias=self.bias)
        self.old_logprobs = logprobs + 0.3 * torch.randn(M, dtype=dtype)
        self.advantages = torch.randn(M, dtype=dtype)
        self.loss_mask = torch.rand(M) > 0.3
        self.weights = 0.5 + torch.rand(M, dtype=dtype)
        self.ref_logprobs = logprobs + 0.3 * torch.randn(M, dtype=dtype)

    def run(self, function: Any = linear_policy_loss, rows: slice = slice(None), **options: Any
            ) -> tuple[Tensor, PolicyStats]:
        options = {"bias": self.bias, "denominator": 7.0, **options}
        return function(self.hidden[rows], self.weight, self.token_ids[rows],
                        self.old_logprobs[rows], self.advantages[rows], self.loss_mask[rows],
                        **options)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.weight, self.bias))


def test_a_masked_token_id_may_be_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CHECK", "1")
    case = Case()
    for function in (linear_policy_loss, linear_policy_loss_reference):
        expected = case.gradients(case.run(function)[0])
        kept = case.token_ids
        case.token_ids = kept.where(case.loss_mask, -100)
        got = case.gradients(case.run(function)[0])
        case.token_ids = kept
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def assert_same_stats(got: PolicyStats, expected: PolicyStats) -> None:
    for name in expected.__dataclass_fields__:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name))
        assert not getattr(got, name).requires_grad


def test_golden(golden: SimpleNamespace) -> None:
    """Two tokens with logits chosen so that the log-prob is exactly log 1/2."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for ratio, advantage, expected in golden.POLICY_LOSSES:
        old_logprobs = torch.tensor([math.log(0.5 / ratio)], dtype=torch.float64)
        loss, stats = linear_policy_loss(
            one, torch.zeros(2, 1, dtype=torch.float64), torch.tensor([1]), old_logprobs,
            torch.tensor([advantage], dtype=torch.float64), torch.tensor([True]), denominator=1)
        assert loss.item() == pytest.approx(expected, abs=1e-12)
        assert stats.ratio.item() == pytest.approx(ratio)
        assert stats.entropy.item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4, 23])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_equals_the_reference(
    chunk_tokens: int | None, temperature: float, entropy_coef: float
) -> None:
    case = Case()
    options = {"temperature": temperature, "entropy_coef": entropy_coef}
    loss, stats = case.run(chunk_tokens=chunk_tokens, **options)
    expected, expected_stats = case.run(linear_policy_loss_reference, **options)
    torch.testing.assert_close(loss, expected)
    assert_same_stats(stats, expected_stats)
    for a, b in zip(case.gradients(3 * loss), case.gradients(3 * expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


TERMS: dict[str, dict[str, Any]] = {
    "higher clip": {"clip_range": 0.05, "clip_range_high": 0.4},
    "dual clip": {"dual_clip": 1.2},
    "k1": {"kl_coef": 0.7, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.7, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.7, "kl_estimator": "k3"},
    "all": {"clip_range_high": 0.4, "dual_clip": 1.2, "kl_coef": 0.7, "entropy_coef": 0.2},
}


def with_terms(case: Case, terms: str, has_weights: bool) -> dict[str, Any]:
    options = dict(TERMS[terms])
    if "kl_coef" in options:
        options["ref_logprobs"] = case.ref_logprobs
    return options | ({"token_weights": case.weights} if has_weights else {})


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("terms", TERMS)
def test_terms_equal_the_reference(terms: str, has_weights: bool) -> None:
    case = Case()
    case.ref_logprobs[0] += 30.0  # beyond the bound of the exponent
    options = with_terms(case, terms, has_weights)
    loss, stats = case.run(chunk_tokens=4, temperature=0.6, **options)
    expected, expected_stats = case.run(linear_policy_loss_reference, temperature=0.6, **options)
    torch.testing.assert_close(loss, expected)
    assert_same_stats(stats, expected_stats)
    for a, b in zip(case.gradients(3 * loss), case.gradients(3 * expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_gradcheck_of_all_terms(estimator: str) -> None:
    case = Case(M=6, D=3, V=5)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_policy_loss(
            hidden, weight, case.token_ids, case.old_logprobs, case.advantages, case.loss_mask,
            bias=bias, denominator=4.0, temperature=0.8, entropy_coef=0.3, chunk_tokens=4,
            clip_range_high=0.4, dual_clip=1.5, token_weights=case.weights, kl_coef=0.6,
            ref_logprobs=case.ref_logprobs, kl_estimator=estimator)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


def one_token(ratio: float, advantage: float, **options: Any) -> tuple[float, float, float]:
    """Loss, its derivative by the log-prob, and whether the clip changed it; log-prob log 1/2."""
    logits = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    loss, stats = linear_policy_loss(
        torch.ones(1, 1, dtype=torch.float64), logits, torch.tensor([1]),
        torch.tensor([math.log(0.5 / ratio)], dtype=torch.float64),
        torch.tensor([advantage], dtype=torch.float64), torch.tensor([True]), denominator=1,
        **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    # The log-prob of token 1 is log sigmoid of the difference of the logits: slope 1/2.
    return loss.item(), 2 * gradient[1].item(), stats.clip_fraction.item()


# (ratio, advantage, loss, derivative by the log-prob, clipped), by hand.
@pytest.mark.parametrize("ratio, advantage, loss, slope, clipped", [
    (1.25, 1.0, -1.25, -1.25, 0), (1.5, 1.0, -1.3, 0.0, 1), (0.95, -1.0, 0.95, 0.95, 0),
    (0.85, -1.0, 0.9, 0.0, 1), (2.0, -1.0, 2.0, 2.0, 0), (4.0, -2.0, 6.0, 0.0, 1),
    (4.0, 1.0, -1.3, 0.0, 1)])
def test_asymmetric_and_dual_clip_by_hand(
    ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    got = one_token(ratio, advantage, clip_range=0.1, clip_range_high=0.3, dual_clip=3.0)
    assert got == pytest.approx((loss, slope, clipped), abs=1e-12)


# The specification's shaped reward: log-probs -1, -2, -0.5 against -1.2, -1.9, -0.9.
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_golden_values_and_slopes(golden: SimpleNamespace, estimator: str) -> None:
    expected = getattr(golden, f"SHAPING_{estimator.upper()}")
    for logprob, ref_logprob, kl in zip(golden.SHAPING_LOGPROBS, golden.SHAPING_REF_LOGPROBS,
                                        expected, strict=True):
        difference = logprob - ref_logprob
        loss, slope, _ = one_token(
            1.0, 0.0, kl_coef=2.0, kl_estimator=estimator,
            ref_logprobs=torch.tensor([math.log(0.5) - difference], dtype=torch.float64))
        assert loss == pytest.approx(2 * kl, abs=1e-7)
        by_hand = 1 - math.exp(-difference) if estimator == "k3" else difference
        assert slope == pytest.approx(2 * by_hand, abs=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_mean_gradient_is_that_of_a_kl(estimator: str) -> None:
    """All tokens, each weighted by its probability: k1 and k2 KL(p || r), k3 KL(r || p)."""
    torch.manual_seed(3)
    scores = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    p = scores[:, 0].log_softmax(0)
    forward = (p.exp() * (p - reference)).sum()
    reverse = (reference.exp() * (reference - p)).sum()
    (expected,) = torch.autograd.grad(reverse if estimator == "k3" else forward, scores)
    ones = torch.ones(7, dtype=torch.float64)
    loss, _ = linear_policy_loss(
        ones[:, None], scores, torch.arange(7), p.detach(), 0 * ones, ones.bool(), denominator=1,
        token_weights=p.detach().exp(), kl_coef=1.0, ref_logprobs=reference, kl_estimator=estimator)
    (got,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options, message", [
    ({"dual_clip": 1.0}, "expected dual_clip above 1, got 1.0"),
    ({"clip_range_high": 0.0}, "clip_range_high"), ({"kl_coef": -0.1}, "kl_coef"),
    ({"kl_coef": 0.1}, "expected ref_logprobs where kl_coef is above 0 .* and none"),
    ({"ref_logprobs": torch.zeros(23)}, "got kl_coef 0.0 and some"),
    ({"kl_estimator": "k4"}, "expected kl_estimator k1, k2 or k3, got 'k4'")])
def test_terms_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Case().run(**options)
    with pytest.raises(ShapeError, match="token_weights"):
        Case().run(token_weights=torch.ones(5))


# One row; one column; GPT-2's vocabulary, which no chunk size divides.
@pytest.mark.parametrize("M, D, V", [(1, 5, 11), (3, 1, 1), (3, 4, 50257)])
def test_odd_shapes_in_float32(M: int, D: int, V: int) -> None:
    case = Case(M, D, V, torch.float32)
    case.loss_mask[:] = True
    got = case.gradients(case.run(entropy_coef=0.1)[0])
    exact = Case(M, D, V)
    for name in ("hidden", "weight", "bias"):
        setattr(exact, name, getattr(case, name).detach().double().requires_grad_())
    exact.__dict__.update(token_ids=case.token_ids, old_logprobs=case.old_logprobs.double(),
                          advantages=case.advantages.double(), loss_mask=case.loss_mask)
    expected = exact.gradients(exact.run(linear_policy_loss_reference, entropy_coef=0.1)[0])
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm() + 1e-7


def test_equals_the_two_steps_it_fuses() -> None:
    case = Case()
    logprobs, entropy = linear_logprobs(case.hidden, case.weight, case.token_ids, bias=case.bias)
    expected, _ = policy_loss(logprobs, case.old_logprobs, case.advantages, case.loss_mask,
                              denominator=7.0)
    expected = expected - 0.2 * entropy[case.loss_mask].sum() / 7.0
    loss, _ = case.run(entropy_coef=0.2)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(case.gradients(loss), case.gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_gradcheck() -> None:
    case = Case(M=6, D=3, V=5)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_policy_loss(
            hidden, weight, case.token_ids, case.old_logprobs, case.advantages, case.loss_mask,
            bias=bias, denominator=4.0, temperature=0.8, entropy_coef=0.3, chunk_tokens=4)[0]

    assert torch.autograd.gradcheck(loss, (case.hidden, case.weight, case.bias))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_split_gives_the_same_loss_and_gradients(
    dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(M=50, dtype=dtype)
    whole, stats = case.run(denominator=50.0, entropy_coef=0.1)
    parts = [case.run(rows=rows, denominator=50.0, entropy_coef=0.1, chunk_tokens=8)
             for rows in (slice(0, 1), slice(1, 31), slice(31, 50))]
    total = parts[0][0] + parts[1][0] + parts[2][0]
    assert (total - whole).abs() <= tolerance * whole.abs()
    for a, b in zip(case.gradients(total), case.gradients(whole), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    assert_same_stats(parts[0][1] + parts[1][1] + parts[2][1], stats)


def test_masked_rows_may_hold_anything() -> None:
    case = Case()
    options = {"entropy_coef": 0.1, "kl_coef": 0.3, "token_weights": case.weights,
               "ref_logprobs": case.ref_logprobs}
    expected, expected_stats = case.run(**options)
    expected_gradients = case.gradients(expected)
    with torch.no_grad():
        for values in (case.hidden, case.old_logprobs, case.advantages, case.weights,
                       case.ref_logprobs):
            values[~case.loss_mask] = float("nan")
    loss, stats = case.run(**options)
    assert torch.equal(loss, expected)
    assert_same_stats(stats, expected_stats)
    got = case.gradients(loss)
    assert (got[0][~case.loss_mask] == 0).all()
    for a, b in zip(got, expected_gradients, strict=True):
        assert torch.equal(a, b)


def test_nothing_counts() -> None:
    case = Case()
    case.loss_mask[:] = False
    loss, stats = case.run(entropy_coef=0.1)
    assert loss.item() == 0 and stats.count.item() == stats.entropy.item() == 0
    assert all((gradient == 0).all() for gradient in case.gradients(loss))


def test_no_tokens() -> None:
    case = Case(M=0)
    loss, stats = case.run()
    assert loss.item() == 0 and stats.count.item() == stats.max_abs_log_ratio.item() == 0
    assert all((gradient == 0).all() for gradient in case.gradients(loss))


def test_forbidden_tokens() -> None:
    """A bias of -inf is as if the token were not in the vocabulary."""
    case, V = Case(), 11
    case.token_ids %= V - 2
    with torch.no_grad():
        case.bias[-2:] = -math.inf
    loss, _ = case.run(entropy_coef=0.1)
    got = case.gradients(loss)
    assert (got[1][-2:] == 0).all() and (got[2][-2:] == 0).all()
    small = Case()
    small.__dict__.update(vars(case))
    small.weight, small.bias = (x.detach()[:-2].requires_grad_()
                                for x in (case.weight, case.bias))
    expected, _ = small.run(linear_policy_loss_reference, entropy_coef=0.1)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(got, small.gradients(expected), strict=True):
        torch.testing.assert_close(a[:len(b)], b)


def test_extreme_logits_and_ratios_stay_finite() -> None:
    case = Case(M=4)
    with torch.no_grad():
        case.hidden.mul_(1e4)
    case.old_logprobs = torch.tensor([-1e4, 0.0, -math.inf, -3.0], dtype=torch.float64)
    case.loss_mask[:] = True
    loss, stats = case.run(entropy_coef=0.1)
    assert loss.isfinite() and stats.ratio.isfinite()
    assert all(gradient.isfinite().all() for gradient in case.gradients(loss))


def test_a_forbidden_token_that_was_taken_has_ratio_zero() -> None:
    case = Case(M=2)
    with torch.no_grad():
        case.bias[case.token_ids[0]] = -math.inf
    case.loss_mask[:] = True
    loss, _ = case.run(entropy_coef=0.1)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in case.gradients(loss))


def test_first_minibatch_has_ratio_one() -> None:
    case = Case()
    with torch.no_grad():
        case.old_logprobs, _ = linear_logprobs(case.hidden, case.weight, case.token_ids,
                                               bias=case.bias)
    _, stats = case.run()
    torch.testing.assert_close(stats.ratio, stats.count)
    assert stats.approx_kl.item() < 1e-25 and stats.clip_fraction.item() == 0


def test_only_the_gradients_asked_for() -> None:
    case = Case()
    frozen = case.weight.detach()
    loss, _ = linear_policy_loss(case.hidden, frozen, case.token_ids, case.old_logprobs,
                                 case.advantages, case.loss_mask, denominator=7.0)
    loss.backward()
    assert case.hidden.grad is not None and frozen.grad is None
    with torch.no_grad():
        assert not case.run()[0].requires_grad


class LargestTensor(TorchFunctionMode):
    """Remembers the largest tensor that any torch function returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None
                           ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_logits_of_all_tokens_never_exist() -> None:
    case = Case(M=64, D=2, V=500)
    with LargestTensor() as largest:
        loss, _ = case.run(chunk_tokens=4, entropy_coef=0.1)
    assert largest.numel == 4 * 500
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x):
        case.run(chunk_tokens=4)
    assert sorted(kept) == [64 * 2, 500, 500 * 2]  # three gradients, nothing else


def test_bfloat16_accumulates_in_float32() -> None:
    """256 chunks whose contributions a bfloat16 sum would drop."""
    case = Case(M=256, D=8, V=50, dtype=torch.float32)
    half, exact = Case(M=256, D=8, V=50), Case(M=256, D=8, V=50)
    for name in ("hidden", "weight", "bias"):
        rounded = getattr(case, name).detach().bfloat16()
        setattr(half, name, rounded.requires_grad_())
        setattr(exact, name, rounded.detach().double().requires_grad_())
    for other in (half, exact):
        other.__dict__.update(token_ids=case.token_ids, loss_mask=case.loss_mask,
                              old_logprobs=case.old_logprobs, advantages=case.advantages)
    got = half.gradients(half.run(chunk_tokens=1)[0])
    expected = exact.gradients(exact.run(linear_policy_loss_reference)[0])
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).norm() <= 3e-3 * b.norm()  # one rounding, 2^-9


def test_non_contiguous_hidden_states() -> None:
    case = Case()
    expected = case.gradients(case.run()[0])
    case.hidden = case.hidden.detach().T.contiguous().T.requires_grad_()
    case.weight = case.weight.detach().T.contiguous().T.requires_grad_()
    for a, b in zip(case.gradients(case.run()[0]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_bad_input() -> None:
    case = Case()
    with pytest.raises(ConfigError, match="linear_policy_loss: expected denominator above 0"):
        case.run(denominator=0)
    with pytest.raises(ConfigError, match="clip_range above 0"):
        case.run(clip_range=0)
    with pytest.raises(ConfigError, match="entropy_coef of at least 0, got -1"):
        case.run(entropy_coef=-1)
    with pytest.raises(ConfigError, match="temperature above 0"):
        case.run(temperature=0)
    with pytest.raises(ShapeError, match=r"bias \[V\] with V = 11, got \[3\]"):
        case.run(bias=torch.ones(3))
    case.advantages = case.advantages[:-1]
    with pytest.raises(ShapeError, match=r"advantages \[22\]"):
        case.run()
    case.advantages, case.loss_mask = case.old_logprobs, case.old_logprobs
    with pytest.raises(ShapeError, match="loss_mask to be bool"):
        case.run()
