"""sample_tokens on a GPU: both kernels against the float64 reference and the exact distribution."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrl.ops import SampledTokens, sample_tokens
from fastrl.ops.sampling import sample_tokens_reference

pytestmark = [pytest.mark.gpu]
BACKEND = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda",
                                                                     marks=pytest.mark.cuda)])


@pytest.fixture(autouse=True)
def on_the_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors are on the GPU; skips where there is none, or no extension."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.node.get_closest_marker("cuda") and (
            importlib.util.find_spec("fastrl_kernels._C") is None):
        pytest.skip("needs the extension fastrl_kernels._C (benchmarks/gpu.sh builds it)")
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


def settings(num_rows: int) -> dict[str, Tensor]:
    """Every kind of row beside the others."""
    ids = torch.arange(num_rows)
    return {
        "temperature": 0.5 + (ids % 3) / 2, "top_k": torch.where(ids % 2 == 0, 40, 0),
        "top_p": torch.where(ids % 5 < 2, 0.8, 1.0), "min_p": torch.where(ids % 7 == 0, 0.02, 0.0),
        "greedy": ids % 11 == 0, "raw_logprobs": ids % 4 == 0,
        "repetition_penalty": torch.where(ids % 3 == 0, 1.3, 1.0),
        "stop_token_ids": torch.stack([ids, torch.full_like(ids, -1)], dim=1),
        "suppresses_stops": ids % 2 == 1}


@BACKEND
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [5, 4096, 50257, 151936])
def test_sampling_equals_the_reference(backend: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits, ids = (3 * torch.randn(64, vocab_size)).to(dtype), torch.arange(64)
    options = {**settings(64), "seen": torch.rand(64, vocab_size) < 0.3}
    got = sample_tokens(logits, ids - 9, ids, **options, backend=backend)
    expected = sample_tokens_reference(logits, ids - 9, ids, **options)
    same = got.token_ids == expected.token_ids
    assert same.float().mean() > 0.95  # a rounded sum may move a token to its neighbour
    assert same[options["greedy"]].all()
    torch.testing.assert_close(got.logprobs[same], expected.logprobs[same], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy, expected.entropy, rtol=1e-4, atol=1e-4)
    is_stop = (got.token_ids[:, None] == options["stop_token_ids"]).any(dim=1)
    assert torch.equal(got.stopped, is_stop)


@BACKEND
@pytest.mark.parametrize("top_k, top_p, limit", [(0, 1.0, 29.59), (3, 1.0, 13.82),
                                                 (0, 0.5, 13.82)])
def test_draws_follow_the_distribution(backend: str, top_k: int, top_p: float, limit: float
                                       ) -> None:
    """99.9% points of chi-square with 10 and 2 degrees of freedom."""
    num_rows = 100_000
    row = torch.linspace(0, 2, 11)
    got = draw(row.expand(num_rows, -1), top_k, top_p, backend)
    probs = row.double().softmax(dim=0)
    kept = probs.clone()
    kept[:-3] *= float(top_k == 0 and top_p == 1)
    expected = kept / kept.sum() * num_rows
    counts = torch.bincount(got.token_ids, minlength=11).double()
    possible = expected > 0
    assert not counts[~possible].any()
    assert ((counts - expected)[possible].square() / expected[possible]).sum() <= limit


def draw(logits: Tensor, top_k: int, top_p: float, backend: str) -> SampledTokens:
    num_rows = len(logits)
    ids, off = torch.arange(num_rows), torch.zeros(num_rows, dtype=torch.bool)
    return sample_tokens(
        logits, torch.full_like(ids, 3), ids, temperature=torch.ones(num_rows),
        top_k=torch.full_like(ids, top_k), top_p=torch.full((num_rows,), top_p),
        min_p=torch.zeros(num_rows), greedy=off, raw_logprobs=off, backend=backend)


@BACKEND
def test_a_captured_graph_draws_the_same(backend: str) -> None:
    logits = torch.randn(8, 3000)
    expected = draw(logits, 20, 0.9, backend)
    graph = torch.cuda.CUDAGraph()
    ids, off = torch.arange(8), torch.zeros(8, dtype=torch.bool)
    fixed = {"temperature": torch.ones(8), "top_k": torch.full_like(ids, 20),
             "top_p": torch.full((8,), 0.9), "min_p": torch.zeros(8), "greedy": off,
             "raw_logprobs": off}
    seeds = torch.full_like(ids, 3)
    with torch.cuda.graph(graph):
        captured = sample_tokens(logits, seeds, ids, **fixed, backend=backend)
    graph.replay()
    for got, value in zip(captured, expected, strict=True):
        assert torch.equal(got, value)
