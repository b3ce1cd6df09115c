"""csrc/ without a GPU: its arithmetic on the CPU, its compilation, its import."""

import ctypes
import fcntl
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastrl_kernels.cuda import adamw, gae, grad_norm, kl, kv_cache, logprob, rewards, sampling
from fastrl_kernels.multi_tensor import CHUNK, adamw_factors
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.ops.adamw import adamw_step_reference
from fastrl.ops.gae import compute_gae_reference
from fastrl.ops.kl import kl_estimate_reference
from fastrl.ops.kv_cache import rotary_write_kv_reference, write_kv_reference
from fastrl.ops.logprob import gather_logprobs_reference
from fastrl.ops.rotary import qk_norm_rotary_reference, rotary_reference
from fastrl.ops.sampling import sample_tokens_reference, uniforms
from fastrl.ops.whiten import row_moments
from fastrl.state_formats import split_master

ROOT = Path(__file__).resolve().parents[2]
OPS = {"adamw", "copy_pages", "gae", "gather_logprobs", "gather_logprobs_gradient",
       "grad_norm_merge", "grad_norm_parts", "kl_estimate", "kl_gradient", "sample_tokens",
       "shape_rewards", "write_kv"}
ARENA_OPS = {"arena_bytes", "arena_free", "arena_granularity", "arena_map", "arena_reserve",
             "arena_unmap"}
"""On addresses, without a kernel; tests/memory/test_arena.py runs them."""


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The `__host__ __device__` functions, compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("arithmetic") / "arithmetic.so"
    source = ROOT / "tests/kernels/arithmetic.cpp"
    subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra",
                    "-Werror", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call_gae(function: ctypes._CFuncPtr, rewards: Tensor, values: Tensor, mask: Tensor,
             gamma: float, lam: float) -> Tensor:
    """The advantages [T] of one row by a function of arithmetic.cpp."""
    advantages = torch.full_like(rewards, float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rewards, values, mask)]
    function(*pointers, ctypes.c_int64(len(rewards)), ctypes.c_float(gamma),
             ctypes.c_float(gamma * lam), ctypes.c_void_p(advantages.data_ptr()))
    return advantages


@pytest.mark.parametrize("name", ["gae_by_steps", "gae_by_scan"])
@pytest.mark.parametrize("lam", [0.95, 1.0, 0.0])
def test_gae_golden(arithmetic: ctypes.CDLL, golden: SimpleNamespace, name: str, lam: float
                    ) -> None:
    rewards, values = torch.tensor(golden.GAE_REWARDS), torch.tensor(golden.GAE_VALUES)
    got = call_gae(arithmetic[name], rewards, values, torch.ones(4, dtype=torch.bool), 1.0, lam)
    # The specification rounds lambda 0.95 to four digits.
    torch.testing.assert_close(got, torch.tensor(golden.GAE_ADVANTAGES[lam]), rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", ["gae_by_steps", "gae_by_scan"])
@pytest.mark.parametrize("length, share", [(1, 1.0), (31, 0.5), (130, 0.8), (1025, 0.1), (9, 0.0)])
def test_gae_with_holes_equals_the_reference(arithmetic: ctypes.CDLL, name: str, length: int,
                                             share: float) -> None:
    rewards, values = torch.randn(2, length)
    mask = torch.rand(length) < share
    rewards[~mask] = values[~mask] = float("nan")
    exact, _ = compute_gae_reference(rewards[None].double(), values[None].double(), mask[None],
                                     gamma=0.99, lam=0.9)
    got = call_gae(arithmetic[name], rewards, values, mask, 0.99, 0.9)
    torch.testing.assert_close(got, exact[0].float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length, num_parts", [(0, 1), (1, 4), (9, 1), (1000, 1), (1000, 256)])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
def test_moments_equal_the_reference(arithmetic: ctypes.CDLL, length: int, num_parts: int,
                                     mean: float) -> None:
    """Parts without a number too; at a mean of 1000 float32 sums of squares lose the variance."""
    values, got = mean + torch.randn(length), torch.full((3,), float("nan"))
    arithmetic.moments_of_parts(ctypes.c_void_p(values.data_ptr()), ctypes.c_int64(length),
                                ctypes.c_int64(num_parts), ctypes.c_void_p(got.data_ptr()))
    exact = row_moments(values.double()[None], torch.ones(1, length, dtype=torch.bool))[0]
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4)


def call_kl(function: ctypes._CFuncPtr, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *outputs)]
    function(*pointers[:2], ctypes.c_int64(len(inputs[0])), *pointers[2:])


def test_kl_golden(arithmetic: ctypes.CDLL, golden: SimpleNamespace) -> None:
    inputs = [torch.tensor(golden.SHAPING_LOGPROBS), torch.tensor(golden.SHAPING_REF_LOGPROBS)]
    got = [torch.full((3,), float("nan")) for _ in range(3)]
    call_kl(arithmetic.kl_all, inputs, got)
    for one, expected in zip(got, (golden.SHAPING_K1, golden.SHAPING_K2, golden.SHAPING_K3),
                             strict=True):
        torch.testing.assert_close(one, torch.tensor(expected), rtol=0, atol=1e-7)


def test_kl_and_its_gradient_equal_the_reference(arithmetic: ctypes.CDLL) -> None:
    """Small and large differences, one beyond the clamp, and NaN, which must not be hidden."""
    logprobs = torch.cat([-torch.rand(50) * 30, torch.tensor([-100.0, -1.0, float("nan")])])
    ref_logprobs = torch.cat([-torch.rand(50) * 30, torch.tensor([-1.0, -100.0, -1.0])])
    leaves = [logprobs.clone().requires_grad_(), ref_logprobs]
    expected = kl_estimate_reference(*leaves)
    got = [torch.zeros(53) for _ in range(3)]
    call_kl(arithmetic.kl_all, [logprobs, ref_logprobs], got)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    gradients, dlogprobs = list(torch.randn(3, 53)), torch.zeros(53)
    (exact,) = torch.autograd.grad(expected, leaves[0], gradients)
    call_kl(arithmetic.kl_all_gradients, [logprobs, ref_logprobs, *gradients], [dlogprobs])
    torch.testing.assert_close(dlogprobs[:52], exact[:52], rtol=1e-5, atol=1e-5)


def row_by_cpu(arithmetic: ctypes.CDLL, z: Tensor, token: int, dlogprob: float, dentropy: float,
               threads: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs [V], entropy and gradient [V] of one row of scores, in a block's order."""
    stats, logprobs, gradient = torch.full((3,), torch.nan), torch.zeros_like(z), z.clone()
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (z, stats, logprobs, gradient)]
    arithmetic.logprob_row(pointers[0], ctypes.c_int64(len(z)), ctypes.c_int64(threads),
                           pointers[1])
    # The gradient lies over the scores, as in place.
    arithmetic.logprob_gradient(pointers[3], ctypes.c_int64(len(z)), pointers[1],
                                ctypes.c_int64(token), ctypes.c_float(dlogprob),
                                ctypes.c_float(dentropy), pointers[2], pointers[3])
    return logprobs, stats[2], gradient


def test_logprob_golden(arithmetic: ctypes.CDLL) -> None:
    """Probabilities 1/2, 1/4, 1/4 of the second token: its log-prob, 3/2 bits, and by hand."""
    z = 7.0 + torch.tensor([0.5, 0.25, 0.25]).log()
    logprobs, entropy, gradient = row_by_cpu(arithmetic, z, 1, 1.0, 0.0)
    torch.testing.assert_close(logprobs, torch.tensor([-0.693147, -1.386294, -1.386294]))
    assert entropy.item() == pytest.approx(1.5 * 0.693147, abs=1e-6)
    torch.testing.assert_close(gradient, torch.tensor([-0.5, 0.75, -0.25]))
    by_entropy = row_by_cpu(arithmetic, z, 1, 0.0, 1.0)[2]  # -p (log p + H)
    torch.testing.assert_close(by_entropy, torch.tensor([-0.1732868, 0.0866434, 0.0866434]),
                               rtol=0, atol=1e-6)


# Below a step, one more than a step, several tiles; columns of -inf, whole warps of them.
@pytest.mark.parametrize("length", [1, 15, 17, 4097, 50257])
@pytest.mark.parametrize("kind", ["plain", "forbidden", "large", "lowest"])
def test_logprob_equals_the_reference(arithmetic: ctypes.CDLL, length: int, kind: str) -> None:
    z = 3 * torch.randn(length)
    if kind == "forbidden":
        z[1:length // 2] = -torch.inf
    elif kind == "large":
        z += 1e4
    elif kind == "lowest":
        z[1::2] = torch.finfo(torch.float32).min
    leaf = z.double().requires_grad_()
    exact = gather_logprobs_reference(leaf[None], torch.tensor([0]))
    (0.7 * exact[0] - 0.3 * exact[1]).sum().backward()
    logprobs, entropy, gradient = row_by_cpu(arithmetic, z, 0, 0.7, -0.3)
    torch.testing.assert_close(logprobs[0].double(), exact[0][0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), exact[1][0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=2e-5, atol=1e-6)


def test_a_row_of_nothing_but_minus_infinity_and_one_with_nan(arithmetic: ctypes.CDLL) -> None:
    nothing, unknown = torch.full((40,), -torch.inf), torch.zeros(40)
    unknown[33] = torch.nan
    for z in (nothing, unknown):
        logprobs, entropy, _ = row_by_cpu(arithmetic, z, 0, 1.0, 0.0)
        assert logprobs.isnan().all() and entropy.isnan()


def test_the_caller_of_gather_logprobs_hands_over_what_the_schema_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch in place of the compiled op: gradients, both in new memory and in place."""

    def forward(logits: Tensor, token_ids: Tensor, temperature: float, logprobs: Tensor,
                entropy: Tensor, maximum: Tensor, log_sum: Tensor, stream: int) -> None:
        for target, value in zip((logprobs, entropy), gather_logprobs_reference(
                logits, token_ids, temperature=temperature), strict=True):
            target.copy_(value)
        maximum.copy_(logits.amax(1) / temperature)
        log_sum.copy_(torch.logsumexp(logits / temperature, 1) - maximum)

    def gradient(logits: Tensor, token_ids: Tensor, entropy: Tensor, maximum: Tensor,
                 log_sum: Tensor, dlogprobs: Tensor, dentropy: Tensor | None, temperature: float,
                 target: Tensor, stream: int) -> None:
        logprobs = logits / temperature - (maximum + log_sum)[:, None]
        result = -logprobs.exp() * dlogprobs[:, None]
        if dentropy is not None:
            result -= dentropy[:, None] * logprobs.exp() * (logprobs + entropy[:, None])
        result.scatter_add_(1, token_ids[:, None], dlogprobs[:, None])
        target.copy_(result / temperature)

    ops = SimpleNamespace(gather_logprobs=forward, gather_logprobs_gradient=gradient)
    monkeypatch.setattr(logprob, "compiled_ops", lambda: ops)
    monkeypatch.setattr(logprob, "stream_of", lambda tensor: 0)
    values, token_ids = torch.randn(4, 9), torch.randint(9, (4,))
    for overwrite, is_transposed in ((False, False), (True, False), (False, True)):
        results = []
        for function, options in ((gather_logprobs_reference, {}),
                                  (logprob.gather_logprobs, {"overwrite_logits": overwrite})):
            leaf = values.clone().requires_grad_()
            logits = (leaf.t().contiguous().t() if is_transposed else leaf) * 1
            logprobs, entropy = function(logits, token_ids, temperature=0.7, **options)
            (logprobs.sum() + 2 * entropy[1]).backward()
            results.append((logprobs.detach(), entropy.detach(), leaf.grad))
        torch.testing.assert_close(results[0], results[1])
        assert torch.equal(logits, leaf.grad) is overwrite  # of the compiled one
    logprobs, _ = logprob.gather_logprobs(leaf, token_ids)
    torch.testing.assert_close(torch.autograd.grad(logprobs[2], leaf)[0][3], torch.zeros(9))


@pytest.mark.parametrize("is_narrow", [False, True])
def test_adamw_gives_the_bits_of_the_reference_for_1000_steps(
    arithmetic: ctypes.CDLL, is_narrow: bool
) -> None:
    """float32 with float32 moments, and bf16 with remainders and 8-bit moments."""
    size, (weight, remainder) = 700, split_master(torch.randn(700))
    ours = [weight, torch.zeros(size, dtype=torch.int8), torch.zeros(size, dtype=torch.uint8),
            remainder, torch.zeros(3), torch.zeros(3)]
    if not is_narrow:
        ours = [torch.randn(size), torch.zeros(size), torch.zeros(size)]
    theirs, betas = [x.clone() for x in ours], torch.tensor([0.9, 1 - 0.9, 0.95, 1 - 0.95])
    function = arithmetic.adamw_codes if is_narrow else arithmetic.adamw_floats
    for number in range(1, 1001):
        gradient = (torch.randn(size) * 10 ** torch.randn(size)).to(weight.dtype)
        gradient = gradient if is_narrow else gradient.float()
        step, scale, rate = torch.tensor(number), torch.rand(()), 1e-3 * (number % 5)
        factors = adamw_factors(step, rate, (0.9, 0.95), 1e-8, scale)
        pointers = [ctypes.c_void_p(x.data_ptr())
                    for x in (ours[0], gradient, *ours[1:3], betas, factors, *ours[3:])]
        function(*pointers[:4], ctypes.c_int64(size), pointers[4],
                 ctypes.c_float(1 - rate * 0.1), *pointers[5:])
        adamw_step_reference(
            theirs[:1], [gradient], theirs[1:2], theirs[2:3], theirs[3:4], step=step,
            learning_rate=rate, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, scale=scale,
            moment_scales=[(theirs[4], theirs[5])] if is_narrow else ())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_nan_of_a_gpu_stays_nan_in_bf16(arithmetic: ctypes.CDLL) -> None:
    """0x7fffffff, which must not be rounded up to 0."""
    weight, remainder = split_master(torch.ones(4))
    scales = torch.tensor([0x7FFFFFFF, 0], dtype=torch.int32).view(torch.float32).split(1)
    codes = torch.zeros(4, dtype=torch.int8)
    factors, betas = torch.tensor([0.1, 1e-8, 1.0]), torch.tensor([0.9, 0.1, 0.95, 0.05])
    gradient = torch.ones(4).bfloat16()
    tensors = (weight, gradient, codes, codes.clone(), betas, factors, remainder, *scales)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    arithmetic.adamw_codes(*pointers[:4], ctypes.c_int64(4), pointers[4], ctypes.c_float(1.0),
                           *pointers[5:])
    assert weight.isnan().all()


def test_the_chunk_of_a_table_is_that_of_the_kernels() -> None:
    header = (ROOT / "csrc/kernels.h").read_text()
    assert re.search(r"TENSOR_CHUNK = (\d+);", header)[1] == str(CHUNK)


# Known-answer vectors of Random123 1.14 (tests/kat_vectors, philox4x32-10) with a counter whose
# upper half is 0, and words of the torch form.
def test_random_words_equal_those_of_torch(arithmetic: ctypes.CDLL) -> None:
    arithmetic.sample_word.restype = ctypes.c_uint32
    seeds = torch.tensor([0, -1, 2**62, 12345, -(2**63)])
    positions = torch.tensor([0, 7, 2**40 + 3, -1, 2**63 - 1])
    words = [arithmetic.sample_word(ctypes.c_int64(seed), ctypes.c_int64(position))
             for seed, position in zip(seeds.tolist(), positions.tolist(), strict=True)]
    assert words[0] == 0x6627E8D5
    expected = (uniforms(seeds, positions) * 2**32 - 0.5).round().long()
    assert words == expected.tolist()


def sampled_row(arithmetic: ctypes.CDLL, scores: Tensor, seed: int, position: int,
                settings: dict[str, Any]) -> tuple[int, float]:
    """Token and least score kept of one row, by the arithmetic of csrc/sampling.h."""
    arithmetic.sample_row.restype = ctypes.c_int64
    floor = ctypes.c_float(float("nan"))
    token = arithmetic.sample_row(
        ctypes.c_void_p(scores.data_ptr()), ctypes.c_int64(len(scores)), ctypes.c_int64(seed),
        ctypes.c_int64(position), ctypes.c_int64(settings.get("top_k", 0)),
        ctypes.c_float(settings.get("top_p", 1.0)), ctypes.c_float(settings.get("min_p", 0.0)),
        ctypes.byref(floor))
    return token, floor.value


@pytest.mark.parametrize("settings", [
    {}, {"top_k": 7}, {"top_k": 503}, {"top_p": 0.6}, {"min_p": 0.05},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02}, {"top_p": 1e-7}], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 503])
def test_sampled_rows_equal_the_reference(arithmetic: ctypes.CDLL, vocab_size: int,
                                          settings: dict[str, Any]) -> None:
    num_rows = 60
    logits = (3 * torch.randn(num_rows, vocab_size)).round(decimals=1)  # with ties
    ids = torch.arange(num_rows)
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "greedy": False,
            "raw_logprobs": False, **settings}
    expected = sample_tokens_reference(
        logits.double(), ids - 9, ids**2,
        **{name: torch.full((num_rows,), value) for name, value in full.items()})
    got = [sampled_row(arithmetic, logits[row], row - 9, row**2, settings)[0]
           for row in range(num_rows)]
    assert got == expected.token_ids.tolist()


def test_sampled_rows_follow_the_distribution_and_end_inside_it(arithmetic: ctypes.CDLL) -> None:
    """99.9% point of chi-square with 3 degrees; tokens of -inf at both ends are never drawn."""
    scores = torch.tensor([-torch.inf, 1.0, 0.0, 0.5, -0.5, -torch.inf])
    tokens = torch.tensor([sampled_row(arithmetic, scores, 3, i, {})[0] for i in range(5000)])
    counts = torch.bincount(tokens, minlength=6).double()
    expected = scores.double().softmax(0) * 5000
    assert counts[0] == counts[5] == 0
    assert ((counts - expected)[1:5].square() / expected[1:5]).sum() <= 16.27
    assert sampled_row(arithmetic, torch.full((4,), -torch.inf), 0, 0, {})[0] == 3
    assert sampled_row(arithmetic, torch.full((4,), torch.nan), 0, 0, {})[0] == 3


def test_what_is_kept_is_found_exactly(arithmetic: ctypes.CDLL) -> None:
    scores = torch.tensor([2.0, 1.0, 1.0, 0.5, -0.0, -1.0, 1e-30, -torch.inf, 1e30, 1.0])
    for top_k, floor in ((1, 1e30), (2, 2.0), (3, 1.0), (5, 1.0), (6, 0.5), (7, 1e-30), (8, -0.0),
                         (9, -1.0)):
        assert sampled_row(arithmetic, scores, 0, 0, {"top_k": top_k})[1] == pytest.approx(floor)


def test_scores_are_adjusted(arithmetic: ctypes.CDLL) -> None:
    arithmetic.sample_adjusted.restype = ctypes.c_float
    for logit, is_seen, is_stop, suppresses, expected in (
            (3.0, 1, 0, 0, 3.0 / 2 / 0.5), (-3.0, 1, 0, 0, -3.0 * 2 / 0.5), (3.0, 0, 1, 0, 6.0),
            (3.0, 0, 1, 1, -math.inf), (3.0, 0, 0, 1, 6.0)):
        got = arithmetic.sample_adjusted(ctypes.c_float(logit), is_seen, is_stop,
                                         ctypes.c_float(0.5), ctypes.c_float(2.0), suppresses)
        assert got == pytest.approx(expected)


def test_the_caller_of_sample_tokens_hands_over_what_the_schema_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With torch in place of the compiled op: every argument in its place and type."""

    def compiled(logits: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor,
                 top_k: Tensor, top_p: Tensor, min_p: Tensor, greedy: Tensor, raw: Tensor,
                 penalty: Tensor, seen: Tensor, stops: Tensor, suppresses: Tensor,
                 token_ids: Tensor, logprobs: Tensor, entropy: Tensor, stopped: Tensor,
                 stream: int) -> None:
        assert logits.stride(1) == 1 and stream == 0
        assert {x.dtype for x in (temperature, top_p, min_p, penalty)} == {torch.float32}
        result = sample_tokens_reference(
            logits, seeds, positions, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, greedy=greedy, raw_logprobs=raw, repetition_penalty=penalty, seen=seen,
            stop_token_ids=stops, suppresses_stops=suppresses)
        for target, value in zip((token_ids, logprobs, entropy, stopped), result, strict=True):
            target.copy_(value)

    monkeypatch.setattr(sampling, "compiled_ops", lambda: SimpleNamespace(sample_tokens=compiled))
    monkeypatch.setattr(sampling, "stream_of", lambda tensor: 0)
    ids = torch.arange(30)
    columns = (ids, ids, torch.linspace(0.5, 2, 30), ids % 5, torch.linspace(0.3, 1, 30),
               torch.linspace(0, 0.2, 30), ids % 7 == 0, ids % 4 == 0,
               torch.linspace(1, 2, 30), torch.rand(30, 9) < 0.5, ids[:, None] % 9, ids % 3 == 0)
    logits = torch.randn(9, 30).t()
    names = ("temperature", "top_k", "top_p", "min_p", "greedy", "raw_logprobs",
             "repetition_penalty", "seen", "stop_token_ids", "suppresses_stops")
    expected = sample_tokens_reference(logits, *columns[:2],
                                       **dict(zip(names, columns[2:], strict=True)))
    for got, value in zip(sampling.sample_tokens(logits, *columns), expected, strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize("has_norm", [True, False])
@pytest.mark.parametrize("C, R, lanes", [(2, 2, 1), (128, 128, 8), (80, 20, 16), (7, 4, 2),
                                         (64, 0, 8)])
def test_a_turned_head_equals_the_reference(arithmetic: ctypes.CDLL, C: int, R: int, lanes: int,
                                            has_norm: bool) -> None:
    x, weight, out = torch.randn(C), torch.randn(C), torch.full((C,), torch.nan)
    angles = 6 * torch.rand(R // 2)
    cos, sin = angles.cos(), angles.sin()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, weight, cos, sin, out)]
    arithmetic.turn_head(pointers[0], pointers[1] if has_norm else None, *pointers[2:4],
                         ctypes.c_int64(C), ctypes.c_int64(R // 2), ctypes.c_int64(lanes),
                         ctypes.c_float(1e-3), pointers[4])
    heads = x[None, None].double()
    wide = [t.double()[None, None] for t in (cos, sin)]
    if has_norm:
        exact = qk_norm_rotary_reference(heads, heads, weight.double(), weight.double(), *wide,
                                         epsilon=1e-3)[0]
    else:
        exact = rotary_reference(heads, heads, *wide)[0]
    torch.testing.assert_close(out.double(), exact[0, 0], rtol=1e-6, atol=1e-6)


def test_a_quarter_turn(arithmetic: ctypes.CDLL) -> None:
    x, out = torch.tensor([1.0, 0.0, 0.0, 2.0, 9.0]), torch.zeros(5)
    zeros, ones = torch.zeros(2), torch.ones(2)
    arithmetic.turn_head(*(ctypes.c_void_p(t) for t in (x.data_ptr(), None, zeros.data_ptr(),
                                                        ones.data_ptr())),
                         ctypes.c_int64(5), ctypes.c_int64(2), ctypes.c_int64(4),
                         ctypes.c_float(0), ctypes.c_void_p(out.data_ptr()))
    assert out.tolist() == [0.0, -2.0, 1.0, 0.0, 9.0]


def test_rows_of_slots_are_those_of_the_layout(arithmetic: ctypes.CDLL) -> None:
    """Every row once; and the last one of 2^33 slots, which int32 could not hold."""
    function = arithmetic.kv_row_of
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64] * 5
    rows = torch.arange(5 * 3 * 2 * 4).view(5, 3, 2, 4)
    for slot in range(20):
        for layer in range(3):
            for side in range(2):
                row = function(slot, layer, side, 3, 4)
                assert row == rows[slot // 4, layer, side, slot % 4]
    assert function(2**33 - 1, 35, 1, 36, 16) == 2**29 * 36 * 2 * 16 - 1


@pytest.mark.parametrize("kind", ["both", "rotary", "norms", "neither"])
def test_the_caller_of_write_kv_hands_over_what_the_schema_says(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """With torch in place of the compiled op."""

    def write(query: Tensor | None, key: Tensor, value: Tensor, q_weight: Tensor | None,
              k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, epsilon: float,
              kv_pages: Tensor, layer: int, slots: Tensor, query_out: Tensor | None, stream: int
              ) -> None:
        if query is None:
            write_kv_reference(key, value, kv_pages, layer, slots)
            return
        query_out.copy_(rotary_write_kv_reference(
            torch.cat([query, key, value], dim=1), kv_pages, layer, slots, cos=cos, sin=sin,
            q_weight=q_weight, k_weight=k_weight, epsilon=epsilon))

    ops = SimpleNamespace(write_kv=write)
    monkeypatch.setattr(kv_cache, "compiled_ops", lambda: ops)
    monkeypatch.setattr(kv_cache, "stream_of", lambda tensor: 0)
    angles = torch.rand(3, 1, 2) if kind in ("both", "rotary") else None
    weights = torch.randn(2, 6) if kind in ("both", "norms") else (None, None)
    options = (None, None) if angles is None else (angles.cos(), angles.sin())
    heads, slots = torch.randn(3, 6, 8), torch.tensor([5, -1, 2])
    for given in (heads, heads.transpose(1, 2).contiguous().transpose(1, 2)):
        given = given[..., :6]
        pages, expected = torch.zeros(2, 2, 2, 4, 2, 6), torch.zeros(2, 2, 2, 4, 2, 6)
        query = kv_cache.rotary_write_kv(given, pages, 1, slots, *options, *weights, 0.1)
        exact = rotary_write_kv_reference(
            given, expected, 1, slots, cos=options[0], sin=options[1], q_weight=weights[0],
            k_weight=weights[1], epsilon=0.1)
        assert torch.equal(query, exact) and torch.equal(pages, expected)


def test_the_cuda_callers_say_what_they_refuse() -> None:
    assert adamw.supports("cpu", torch.float32) == "the tensors are on cpu"
    assert adamw.supports("cuda", torch.bfloat16) is None
    for dtype in (torch.float16, torch.float64):
        assert str(dtype)[6:] in str(adamw.supports("cuda", dtype))
    assert grad_norm.supports is gae.supports
    assert gae.supports("cpu", torch.float32) == "the tensors are on cpu"
    assert "float64" in str(gae.supports("cuda", torch.float64))
    assert gae.supports("cuda", torch.bfloat16) is None
    assert kl.supports is rewards.supports is logprob.supports is gae.supports
    assert kv_cache.supports("cpu", torch.float32) == "the tensors are on cpu"
    assert "float64" in str(kv_cache.supports("cuda", torch.float64))
    assert kv_cache.supports("cuda", torch.float16) is None


def test_a_compiled_graph_knows_the_shapes() -> None:
    with FakeTensorMode():
        rewards, values = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(3, 5)
        padded = torch.ops.fastrl_cuda.compute_gae(rewards, values, None, None, 1.0, 0.95)
        offsets = torch.empty(3, dtype=torch.int64)
        packed = torch.ops.fastrl_cuda.compute_gae(values[0], values[0], None, offsets, 1.0, 0.95)
        estimates = torch.ops.fastrl_cuda.kl_estimates(values, values, None)
        dvalues = torch.ops.fastrl_cuda.kl_estimates_backward(values, values, None, *estimates)
        shaped = torch.ops.fastrl_cuda.shaped_rewards(values[:, 0], values, values, values > 0,
                                                      0.1, 1, 3)
        logits = torch.empty(3, 5, dtype=torch.bfloat16)
        per_row = torch.ops.fastrl_cuda.token_logprobs(logits, offsets, 1.0)
        dlogits = torch.ops.fastrl_cuda.token_logprobs_backward(
            logits, offsets, *per_row[1:], per_row[0], None, 1.0)
        drawn = torch.ops.fastrl_cuda.sampled_tokens(logits, *[offsets] * 8, *[None] * 4)
        norm = torch.ops.fastrl_cuda.grad_norm([rewards, values])
        pages, heads = torch.empty(2, 1, 2, 4, 2, 6), torch.empty(3, 9, 6)
        query = torch.ops.fastrl_cuda.turned_and_written_kv(heads, pages, 0, offsets, None, None,
                                                            None, None, 0.0)
        assert torch.ops.fastrl_cuda.written_kv(heads, heads, pages, 0, offsets) is None
        assert torch.ops.fastrl_cuda.copied_pages(pages, offsets, offsets) is None
        lists = [[values], [values], [values], [values], [], []]
        assert torch.ops.fastrl_cuda.adamw_step(*lists, values, 0.9, 0.95, 1.0, [True]) is None
    assert query.shape == (3, 5, 6)
    assert norm.shape == () and norm.dtype == torch.float64
    assert [(list(x.shape), x.dtype) for x in per_row] == [([3], torch.float32)] * 4
    assert dlogits.shape == logits.shape and dlogits.dtype == torch.bfloat16
    assert [(list(x.shape), x.dtype) for x in padded] == [
        ([3, 5], torch.float32), ([3, 5], torch.float32), ([3, 3], torch.float32)]
    assert [list(x.shape) for x in packed] == [[5], [5], [2, 3]]
    assert [list(x.shape) for x in (*estimates, dvalues, *shaped)] == [[3, 5]] * 5 + [[3, 3, 5]]
    assert [(list(x.shape), x.dtype) for x in drawn] == [
        ([3], dtype) for dtype in (torch.int64, torch.float32, torch.float32, torch.bool)]


@pytest.fixture
def compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The compiled ops by their schemas alone: a call is checked, and results are 0."""
    library = torch.library.Library("fastrl_schemas", "FRAGMENT")
    text = (ROOT / "csrc/bindings.cpp").read_text()
    schemas = ["".join(re.findall(r'"(.*?)"', lines))
               for lines in re.findall(r"m\.def\((.*?)\);", text, re.S)]

    def run(arguments: Any, *values: Any) -> None:
        for value, argument in zip(values, arguments, strict=True):
            if argument.alias_info is not None and value is not None:
                value.zero_()

    for schema in schemas:
        arguments = torch._C.parse_schema(schema).arguments
        library.impl(library.define(schema), partial(run, arguments), "CPU")
    for module in (adamw, gae, grad_norm, kl, kv_cache, logprob, rewards, sampling):
        monkeypatch.setattr(module, "compiled_ops", lambda: torch.ops.fastrl_schemas)
        monkeypatch.setattr(module, "stream_of", lambda tensor: 0)
    assert len(schemas) == len(OPS | ARENA_OPS)
    yield
    library._destroy()


def test_every_caller_follows_the_schemas_and_passes_opcheck(compiled_on_a_cpu: None) -> None:
    ops, opcheck = torch.ops.fastrl_cuda, torch.library.opcheck
    x, mask, ids = torch.randn(3, 5), torch.rand(3, 5) > 0.3, torch.tensor([0, 2, 4])
    for given in ((x, x, None, None), (x.half(), x, mask, None),
                  (x[0], x[0], mask[0], torch.tensor([0, 2, 5]))):
        opcheck(ops.compute_gae, (*given, 0.9, 0.8))
    for keep in (None, mask):
        opcheck(ops.kl_estimates, (x.clone().requires_grad_(), x, keep))
        opcheck(ops.kl_estimates_backward, (x, x, keep, x, x, x))
    for estimator, num_estimates in ((1, 1), (2, 1), (3, 3)):
        opcheck(ops.shaped_rewards, (x[:, 0], x, x, mask, 0.1, estimator, num_estimates))
    opcheck(ops.token_logprobs, (x.bfloat16(), ids, 0.7))
    for dentropy in (None, x[:, 0]):
        opcheck(ops.token_logprobs_backward, (x, ids, *[x[:, 0]] * 4, dentropy, 0.7))
    for adjusted in ([None] * 4, [x[:, 0], mask, ids[:, None], mask[:, 0]]):
        opcheck(ops.sampled_tokens, (x, ids, ids, x[:, 0], ids, x[:, 0], x[:, 0], mask[:, 0],
                                     mask[:, 0], *adjusted))
    heads, pages, slots = torch.randn(3, 4, 6), torch.zeros(2, 1, 2, 4, 1, 6), torch.arange(3)
    angles, norm = torch.randn(3, 1, 3), torch.randn(6)
    opcheck(ops.written_kv, (heads[:, :1], heads[:, 1:2], pages, 0, slots))
    for turned in ((angles, angles, None, None), (None, None, norm, norm)):
        opcheck(ops.turned_and_written_kv, (heads, pages, 0, slots, *turned, 1e-6))
    opcheck(ops.copied_pages, (pages, slots[:1], slots[1:2]))
    opcheck(ops.grad_norm, ([x, x.bfloat16()],))
    opcheck(ops.adamw_step, ([x.clone()], [x], [x.clone()], [x.clone()], [], [], x[0, :3], 0.9,
                             0.95, 1.0, [True]))


def test_every_registered_op_is_given_to_opcheck() -> None:
    for path in (ROOT / "kernels/fastrl_kernels/cuda").glob("*.py"):
        for op in re.findall(r'custom_op\(\s*"fastrl_cuda::(\w+)"', path.read_text()):
            assert f"opcheck(ops.{op}," in Path(__file__).read_text(), op


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The extension, built as an installation does: `library` is its file, `report` nvcc's.

    Built once, also where pytest-xdist gives the tests of this file to several processes.
    """
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # that of all workers of this run
    report, library = folder / "build/report", folder / "build/lib/fastrl_kernels/_C.abi3.so"
    report.parent.mkdir(exist_ok=True)
    with (report.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            environment = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST"}
            done = subprocess.run(
                [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "build/lib"),
                 "--build-temp", str(folder / "build/temp")],
                cwd=ROOT, env={**environment, "FASTRL_BUILD_CUDA": "1"}, capture_output=True,
                text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            report.write_text(done.stdout)
    return SimpleNamespace(library=library, report=report.read_text())


@pytest.fixture
def setup_file(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py defines, without a build."""
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("FASTRL_BUILD_CUDA", raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize("known, expected", [
    ("sm_80\nsm_90\nsm_100\nsm_120\n", ["80", "90a", "100"]),
    ("sm_70\nsm_80\nsm_90\n", ["80", "90a"])])
def test_a_build_is_for_what_nvcc_knows(setup_file: dict[str, Any], known: str,
                                        expected: list[str], monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=known))
    assert setup_file["gencode"]() == [
        f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in expected]


def test_a_build_can_be_restricted_to_architectures(
    setup_file: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gencode = setup_file["gencode"]
    for listed, expected in (
            ("9.0a", ["-gencode=arch=compute_90a,code=sm_90a"]),
            ("8.0;10.0+PTX", ["-gencode=arch=compute_80,code=sm_80",
                              "-gencode=arch=compute_100,code=[sm_100,compute_100]"])):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert gencode() == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: .* got 'Hopper'"):
        gencode()


def test_the_extension_may_be_in_another_folder_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "fastrl_kernels").mkdir()
    (tmp_path / "fastrl_kernels/_C.py").write_text("")
    code = "import importlib.util; print(importlib.util.find_spec('fastrl_kernels._C').origin)"
    path = f"{ROOT / 'kernels'}{os.pathsep}{tmp_path}"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path},
                         capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(tmp_path / "fastrl_kernels/_C.py")


def test_every_cuda_op_has_a_test_for_a_gpu() -> None:
    text = "".join(p.read_text() for p in (ROOT / "tests/kernels").glob("test_*_on_gpu.py"))
    for path in (ROOT / "kernels/fastrl_kernels/cuda").glob("*.py"):
        assert path.stem == "__init__" or re.search(
            rf'^    "{path.stem}": GpuOp|^def test_{path.stem}\b|^def test_{path.stem}_', text, re.M
        ), f"{path.name} has no test for a GPU"


# One that nvcc itself finds, one that only the host compiler does.
@pytest.mark.parametrize("source", ["__global__ void kernel() { int unused; }\n",
                                    "int function(int unused) { return 1; }\n"])
def test_a_warning_is_an_error(setup_file: dict[str, Any], source: str, tmp_path: Path,
                               capfd: pytest.CaptureFixture[str]) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    (tmp_path / "warns.cu").write_text(source)
    with pytest.raises(SystemExit, match="warns.cu: nvcc failed"):
        setup_file["compile_source"](tmp_path / "warns.cu", tmp_path / "warns.o", ["-arch=sm_80"])
    assert "unused" in capfd.readouterr().out


def test_every_op_is_one_launch() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc").glob("*.cu"))
    assert sources.count("<<<") == len(OPS)


def test_every_kernel_compiles_without_spills(build: SimpleNamespace) -> None:
    for architecture in ("sm_80", "sm_90a"):
        for path in (ROOT / "csrc").glob("*.cu"):
            assert re.search(rf"entry function '\w*{path.stem}\w*' for '{architecture}'",
                             build.report), f"{path.name} has no kernel for {architecture}"
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", build.report)) == {"0"}


def test_the_extension_imports_and_registers_without_a_gpu(build: SimpleNamespace) -> None:
    """In its own process, under its own name; a CPU tensor is refused by the dispatcher."""
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("fastrl_kernels._C", {str(build.library)!r})
importlib.util.module_from_spec(spec)
for name in {sorted(OPS | ARENA_OPS)!r}:
    print(getattr(torch.ops.fastrl_cuda, name).default._schema)
x = torch.zeros(1, 1)
try:
    torch.ops.fastrl_cuda.gae(x, x, None, None, 1.0, 1.0, x, x, None, 0)
except NotImplementedError:
    print("refused")
try:
    torch.ops.fastrl_cuda.arena_granularity(0)
except RuntimeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("fastrl_cuda::") == len(OPS | ARENA_OPS) and "refused" in out.stdout


def test_the_extension_links_no_cuda_library(build: SimpleNamespace) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    out = subprocess.run(["readelf", "-d", str(build.library)], capture_output=True, text=True,
                         check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", out.stdout)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "cuda" in name] == []
