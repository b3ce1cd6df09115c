"""linear_policy_loss with its Triton kernel against the float64 reference; run by
test_triton.py."""

from collections import defaultdict
from dataclasses import fields
from typing import Any

import pytest
import torch
from fastrl_kernels.triton import linear_logprob
from fastrl_kernels.triton import linear_policy_loss as kernels
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastrl.errors import BackendUnavailableError
from fastrl.ops import PolicyStats, linear_policy_loss
from fastrl.ops.linear_policy_loss import linear_policy_loss_reference

FLOOR = 3e-6  # float32 sums in another order
NAMES = ("hidden", "weight", "bias", "token_ids", "old_logprobs", "advantages", "loss_mask")


class Case:
    """Inputs of one call; ratios on both sides of the clip, a third of the tokens masked."""

    def __init__(self, M: int = 9, D: int = 7, V: int = 130,
                 dtype: torch.dtype = torch.float32) -> None:
        self.hidden, self.weight = torch.randn(M, D).to(dtype), torch.randn(V, D).to(dtype)
        self.bias: Tensor | None = torch.randn(V).to(dtype)
        self.token_ids = torch.randint(V, (M,))
        logits = (self.hidden @ self.weight.T + self.bias).float()
        logprobs = logits.log_softmax(-1).gather(1, self.token_ids[:, None])[:, 0]
        self.old_logprobs = logprobs + 0.3 * torch.randn(M)
        self.advantages = torch.randn(M)
        self.loss_mask = torch.arange(M) % 3 != 1
        self.weights = torch.rand(M) + 0.5
        self.ref_logprobs = logprobs + 0.3 * torch.randn(M)

    def run(self, function=linear_policy_loss, double: bool = False, **options
            ) -> tuple[Tensor, PolicyStats, list[Tensor]]:
        """Loss, statistics, and the gradients of hidden, weight and, where there is one, bias."""
        values = {name: getattr(self, name) for name in NAMES}
        for name, x in values.items():
            if x is not None and x.is_floating_point() and double:
                values[name] = x.double()
        for name in ("token_weights", "ref_logprobs"):
            if options.get(name) is not None and double:
                options[name] = options[name].double()
        leaves = {name: values[name].detach().requires_grad_() for name in NAMES[:3]
                  if values[name] is not None}
        loss, stats = function(**{**values, **leaves}, **{"denominator": 7.0, **options})
        (3 * loss).backward()
        return loss, stats, [x.grad for x in leaves.values()]

    def assert_as_good_as_torch(self, floor: float = FLOOR, chunk_tokens: int | None = None,
                                **options) -> None:
        truth = self.run(linear_policy_loss_reference, double=True, **options)
        plain = self.run(linear_policy_loss_reference, **options)
        ours = self.run(backend="triton", chunk_tokens=chunk_tokens, **options)
        for wide, torch_result, result in zip(*([x[0], *x[2]] for x in (truth, plain, ours)),
                                              strict=True):
            assert result.dtype == torch_result.dtype and result.shape == wide.shape
            error, torch_error = ((x - wide).abs().max() for x in (result, torch_result))
            assert error <= 2 * torch_error + floor * (wide.abs().max() + 1e-30)
        for field in fields(PolicyStats):
            result, wide = getattr(ours[1], field.name), getattr(truth[1], field.name)
            assert result.dtype == torch.float64 and not result.requires_grad
            torch.testing.assert_close(result, wide, rtol=1e-4, atol=1e-5)


# One of each; chunks of one, of unequal size, of all; a vocabulary of several blocks.
@pytest.mark.parametrize("M, D, V, chunk_tokens", [(1, 1, 2, None), (9, 7, 130, 1), (9, 7, 130, 4),
                                                   (9, 7, 130, None), (3, 4, 9001, 2)])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.2])
def test_sizes(M: int, D: int, V: int, chunk_tokens: int | None, entropy_coef: float) -> None:
    Case(M, D, V).assert_as_good_as_torch(chunk_tokens=chunk_tokens, entropy_coef=entropy_coef)


@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"clip_range": 0.05},
                                     {"denominator": 1e5}])
def test_coefficients(options: dict[str, float]) -> None:
    Case().assert_as_good_as_torch(entropy_coef=0.1, **options)


TERMS = {
    "higher clip": {"clip_range": 0.05, "clip_range_high": 0.4},
    "dual clip": {"dual_clip": 1.2},
    "k1": {"kl_coef": 0.7, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.7, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.7, "kl_estimator": "k3"},
    "all": {"clip_range_high": 0.4, "dual_clip": 1.2, "kl_coef": 0.7, "entropy_coef": 0.2},
}


@pytest.mark.parametrize("has_weights", [False, True])
@pytest.mark.parametrize("terms", TERMS)
def test_terms(terms: str, has_weights: bool) -> None:
    """A third of the ratios is above 1.2 or below 0.8; a reference far away meets the bound."""
    case, options = Case(), dict(TERMS[terms])
    case.ref_logprobs[0] += 30.0
    if "kl_coef" in options:
        options["ref_logprobs"] = case.ref_logprobs
    if has_weights:
        options["token_weights"] = case.weights
    case.assert_as_good_as_torch(chunk_tokens=4, **options)


def test_without_a_bias() -> None:
    case = Case()
    case.bias = None
    case.assert_as_good_as_torch()


# The gradient of the logits lies in half of each row, over several blocks. The interpreter cuts a
# float32 to bfloat16 where a GPU rounds: 2^-8. At that denominator a scaled gradient would vanish
# in float16, whose smallest number is 6e-8.
@pytest.mark.parametrize("dtype, floor", [(torch.float16, 2**-9), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("denominator", [7.0, 1e4])
def test_half_precision(dtype: torch.dtype, floor: float, denominator: float) -> None:
    Case(V=9001, dtype=dtype).assert_as_good_as_torch(floor, chunk_tokens=4, entropy_coef=0.1,
                                                      denominator=denominator)


def test_the_gradient_of_the_head_is_added_up_in_float32() -> None:
    """134 chunks whose contributions a sum in half precision would round away."""
    case = Case(M=200, V=50, dtype=torch.float16)
    truth = case.run(linear_policy_loss_reference, double=True)[2]
    ours = case.run(backend="triton", chunk_tokens=1)[2]
    for result, wide in zip(ours, truth, strict=True):
        assert (result - wide).norm() <= 2**-11 * wide.norm()


def test_half_precision_logits_on_request() -> None:
    case = Case(V=9001, dtype=torch.float16)
    options = {"bias": case.bias, "denominator": 7.0}
    inputs = [getattr(case, name) for name in NAMES if name != "bias"]
    buffers = []
    for dtype in (torch.float32, torch.float16):
        loss, stats = kernels.linear_policy_loss(*inputs, **options, logits_dtype=dtype)
        buffers.append((loss, stats))
    torch.testing.assert_close(buffers[0], buffers[1], rtol=2e-2, atol=2e-3)
    assert not torch.equal(buffers[0][0], buffers[1][0])


def test_masked_rows_may_hold_anything() -> None:
    case = Case()
    options = {"entropy_coef": 0.1, "kl_coef": 0.3, "token_weights": case.weights,
               "ref_logprobs": case.ref_logprobs}
    expected = case.run(backend="triton", **options)
    for values in (case.hidden, case.old_logprobs, case.advantages, case.weights,
                   case.ref_logprobs):
        values[~case.loss_mask] = torch.nan
    got = case.run(backend="triton", **options)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(got[2], expected[2], strict=True))
    assert (got[2][0][~case.loss_mask] == 0).all()


def test_nothing_counts_and_no_tokens() -> None:
    masked, empty = Case(), Case(M=0)
    masked.loss_mask[:] = False
    for case in (masked, empty):
        loss, stats, gradients = case.run(backend="triton", entropy_coef=0.1)
        assert loss.item() == 0
        assert all(getattr(stats, field.name).item() == 0 for field in fields(PolicyStats))
        assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nan_in_a_row_that_counts_is_not_hidden() -> None:
    for name in ("hidden", "old_logprobs", "advantages"):
        case = Case()
        getattr(case, name)[0] = torch.nan
        assert case.run(backend="triton")[0].isnan(), name


def test_forbidden_tokens_one_of_them_taken() -> None:
    case = Case()
    case.bias[::3] = -torch.inf
    case.token_ids = case.token_ids // 3 * 3 + 1
    case.token_ids[0] = 0
    case.token_ids.clamp_(max=128)
    case.assert_as_good_as_torch(entropy_coef=0.1)


def test_ratios_beyond_every_bound() -> None:
    case = Case(M=6)
    case.loss_mask[:] = True
    case.old_logprobs[:4] = torch.tensor([-1e4, 0.0, -40.0, 30.0])
    case.advantages[:4] = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, _, gradients = case.run(backend="triton", entropy_coef=0.1)
    expected, _, expected_gradients = case.run(backend="torch", entropy_coef=0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_ratios_near_one_keep_the_digits_of_k3() -> None:
    """exp(u) - 1 - u of u = 1e-4 is 5e-9, below the last digit of 1 in float32."""
    case = Case(M=1, D=1, V=2)
    case.weight.zero_()
    case.bias.zero_()
    case.old_logprobs = torch.tensor([0.5]).log() - 1e-4
    stats = case.run(backend="triton")[1]
    assert stats.approx_kl_k3.item() == pytest.approx(5e-9, rel=1e-2)


def test_not_contiguous() -> None:
    case = Case()
    for name in NAMES:
        strided = getattr(case, name).repeat_interleave(2, dim=-1)[..., ::2]
        assert strided.numel() == 1 or not strided.is_contiguous()
        setattr(case, name, strided)
    case.assert_as_good_as_torch(chunk_tokens=4)


def test_a_token_does_not_depend_on_the_others() -> None:
    case = Case()
    logits = torch.randn(9, 300)
    K = kernels.NUM_STATS
    together = torch.full((K, 9), torch.nan, dtype=torch.float64)
    inputs = [case.token_ids, case.old_logprobs, case.advantages, case.loss_mask, case.weights,
              case.ref_logprobs]
    settings = (None, torch.float32, kernels.Settings(0.2, 0.3, 3.0, 1.0, 0.1, 0.5, 3, 20.0, 20.0))
    all_gradients = kernels.policy_loss_of_logits(logits.clone(), *inputs, together, *settings)
    for m in range(9):
        alone, row = torch.full((K, 1), torch.nan, dtype=torch.float64), slice(m, m + 1)
        gradient = kernels.policy_loss_of_logits(logits[row].clone(), *(x[row] for x in inputs),
                                                 alone, *settings)
        assert torch.equal(alone[:, 0], together[:, m])
        assert torch.equal(gradient[0], all_gradients[m])


def test_only_the_gradients_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    inputs = [getattr(case, name) for name in NAMES if name != "bias"]
    weight = case.weight.requires_grad_()
    loss, _ = linear_policy_loss(*inputs, denominator=7.0, backend="triton")
    loss.backward()
    assert weight.grad is not None and case.hidden.grad is None
    written: list[Tensor] = []
    monkeypatch.setattr(kernels, "gradient_view", lambda *args: written.append(args[0]))
    with torch.no_grad():
        loss, _ = linear_policy_loss(*inputs, denominator=7.0, backend="triton")
    assert not loss.requires_grad and not written


def test_one_chunk_of_logits_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    case, made = Case(M=64, V=500), []
    new_chunk = kernels.new_chunk
    monkeypatch.setattr(kernels, "new_chunk",
                        lambda *args: made.append(new_chunk(*args)) or made[-1])
    case.run(backend="triton", chunk_tokens=8)
    assert [tuple(buffer.shape) for buffer in made] == [(8, 500)]


class PeakBytes(TorchDispatchMode):
    """The most bytes at a time in tensors that ops returned while it was on."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None
                           ) -> Any:
        result = function(*args, **(kwargs or {}))
        arguments = {x.untyped_storage()._cdata for x in args if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage._cdata not in arguments:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.storages = {k: v for k, v in self.storages.items() if not v[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


def test_a_gigabyte_is_enough_at_the_reference_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory; what a GPU does by itself, product and kernel, is counted only."""
    M, D, V = 8192, 4096, 151936
    calls: dict[str, int] = defaultdict(int)

    def count(name: str) -> None:
        calls[name] += 1

    monkeypatch.setattr(linear_logprob, "multiply", lambda *args, **options: count("products"))
    launcher = type("Launcher", (), {"__getitem__": lambda self, grid: (
        lambda *args, **options: count("launches"))})()
    monkeypatch.setattr(kernels, "_policy_loss_kernel", launcher)
    hidden, weight, bias = (torch.empty(shape, dtype=torch.bfloat16, device="meta",
                                        requires_grad=True) for shape in ((M, D), (V, D), (V,)))
    floats, ids = torch.empty(M, device="meta"), torch.empty(M, dtype=torch.int64, device="meta")
    with PeakBytes() as bytes_made:
        loss, _ = kernels.linear_policy_loss(hidden, weight, ids, floats, floats, ids > 0,
                                             bias=bias, denominator=7.0, entropy_coef=0.1)
        wide_gradients = 4 * (M * D + V * D + V)
        assert wide_gradients < bytes_made.peak <= wide_gradients + 1e9
        bytes_made.peak = 0
        loss.backward()
    assert calls["launches"] > 1 and calls["products"] == 3 * calls["launches"]
    # Backward: the gradients in the type of the inputs, and nothing else of any size.
    assert bytes_made.peak <= 1.5 * wide_gradients + 1e6


def test_registered_op() -> None:
    case = Case()
    inputs = [getattr(case, name) for name in NAMES]
    settings = [0.2, 0.3, 3.0, 0.9, 0.1, 0.5, 3.0, 20.0, 20.0]
    for needs, optional in (([True, True, True], (case.weights, case.ref_logprobs)),
                            ([False, True, False], (None, case.ref_logprobs)),
                            ([False, False, False], (case.weights, case.ref_logprobs))):
        torch.library.opcheck(torch.ops.fastrl_kernels.linear_policy_loss,
                              (*inputs, *optional, settings, 4, torch.float32, False, needs))


def test_compiles_to_one_graph() -> None:
    case = Case()
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")
    eager = case.run(backend="triton", entropy_coef=0.1)
    traced = case.run(compiled, backend="triton", entropy_coef=0.1)
    torch.testing.assert_close(traced[0], eager[0])
    torch.testing.assert_close(traced[2], eager[2], rtol=1e-6, atol=0)
    assert torch.equal(traced[1].approx_kl_k3, eager[1].approx_kl_k3)


def test_float64_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        Case().run(double=True, backend="triton")
