"""What writes pages, on a GPU: both kernels against the float64 reference, an arena above 2^31."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastrl.ops import copy_pages, qk_norm_rotary, rotary, rotary_write_kv, write_kv
from fastrl.ops.kv_cache import (
    copy_pages_reference,
    rotary_write_kv_reference,
    write_kv_reference,
)

pytestmark = [pytest.mark.gpu]
BACKEND = pytest.mark.parametrize("backend", ["triton", pytest.param("cuda",
                                                                     marks=pytest.mark.cuda)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
FLOORS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}


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


def inputs(N: int, Hq: int, Hk: int, C: int, R: int, dtype: torch.dtype
           ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Merged projections, pages of 16 slots, slots with every fifth -1, angles and weights."""
    angles, weights = 6 * torch.rand(N, 1, R // 2), torch.randn(2, C).to(dtype)
    num_pages = N // 8 + 2
    slots = torch.randperm(num_pages * 16)[:N]
    slots[::5] = -1
    return (torch.randn(N, Hq + 2 * Hk, C).to(dtype),
            torch.randn(num_pages, 3, 2, 16, Hk, C).to(dtype), slots,
            {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype),
             "q_weight": weights[0], "k_weight": weights[1]})


@BACKEND
@DTYPES
@pytest.mark.parametrize("sizes", [(1, 1, 1, 2, 2), (37, 3, 1, 24, 24), (65, 2, 2, 80, 20),
                                   (9, 2, 1, 7, 4), (300, 32, 8, 128, 128), (33, 4, 2, 256, 64)])
@pytest.mark.parametrize("names", [("cos", "sin"), ("q_weight", "k_weight"),
                                   ("cos", "sin", "q_weight", "k_weight")])
def test_kv_cache_equals_the_reference(
    backend: str, dtype: torch.dtype, sizes: tuple[int, int, int, int, int],
    names: tuple[str, ...],
) -> None:
    heads, pages, slots, everything = inputs(*sizes, dtype)
    options = {name: everything[name] for name in names}
    results = []
    for function, wide, more in ((rotary_write_kv, False, {"backend": backend}),
                                 (rotary_write_kv_reference, False, {}),
                                 (rotary_write_kv_reference, True, {})):
        kind = torch.float64 if wide else dtype
        written = pages.to(kind, copy=True)
        query = function(heads.to(kind), written, 1, slots,
                         **{k: x.to(kind) for k, x in options.items()}, epsilon=1e-6, **more)
        results.append((query, written))
    for ours, plain, truth in zip(*results, strict=True):
        error, torch_error = ((x.double() - truth).abs().max() for x in (ours, plain))
        assert error <= 2 * torch_error + FLOORS[dtype] * truth.abs().max()
    kept = torch.ones_like(pages, dtype=torch.bool)
    places = slots[slots >= 0]
    kept[places // 16, 1, :, places % 16] = False
    assert torch.equal(results[0][1][kept], pages[kept])


@pytest.mark.parametrize("names", [("cos", "sin"), ("cos", "sin", "q_weight", "k_weight")])
@DTYPES
def test_the_trainer_gets_the_same_bits(dtype: torch.dtype, names: tuple[str, ...]) -> None:
    """Of the Triton kernels, any number of tokens: the first GPU run confirms it."""
    heads, pages, _, everything = inputs(65, 32, 8, 128, 128, dtype)
    options = {name: everything[name] for name in names}
    query, key, value = heads.split([32, 8, 8], dim=1)
    angles = options["cos"], options["sin"]
    trainers = (rotary(query, key, *angles, backend="triton") if len(names) == 2 else
                qk_norm_rotary(query, key, options["q_weight"], options["k_weight"], *angles,
                               epsilon=1e-6, backend="triton"))
    slots = torch.randperm(len(pages) * 16)[:65]
    for rows in (slice(None), slice(7, 8), slice(3, 20)):
        got = rotary_write_kv(heads[rows], pages, 2, slots[rows], epsilon=1e-6, backend="triton",
                              **{k: x[rows] if x.dim() == 3 else x for k, x in options.items()})
        written = pages[:, 2].transpose(1, 2).flatten(0, 1)[slots[rows]]
        for ours, theirs in zip((got, *written.unbind(1)), (*trainers, value), strict=True):
            assert torch.equal(ours, theirs[rows])


@BACKEND
@DTYPES
def test_write_kv_and_torch_without_a_look(backend: str, dtype: torch.dtype) -> None:
    heads, pages, slots, _ = inputs(65, 2, 3, 5, 4, dtype)
    expected, plain = pages.clone(), pages.clone()
    write_kv(heads[:, 2:5], heads[:, 5:], pages, 1, slots, backend=backend)
    write_kv_reference(heads[:, 2:5], heads[:, 5:], expected, 1, slots)
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_kv(heads[:, 2:5], heads[:, 5:], plain, 1, slots, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(pages, expected) and torch.equal(plain, expected)


@BACKEND
@pytest.mark.parametrize("C", [5, 8, 400])
def test_copied_pages_equal_the_reference(backend: str, C: int) -> None:
    pages = torch.randn(70, 3, 2, 16, 3, C).bfloat16()
    expected, ids = pages.clone(), torch.randperm(70)
    sources, targets = ids[:30], ids[30:60]
    copy_pages(pages, sources, targets, backend=backend)
    copy_pages_reference(expected, sources, targets)
    assert torch.equal(pages.view(torch.int16), expected.view(torch.int16))


@BACKEND
def test_an_arena_of_more_than_2_31_numbers(backend: str) -> None:
    """5 GB of pages: their last one is written, and copied to another beyond 2^31."""
    heads, _, _, options = inputs(4, 4, 2, 64, 64, torch.bfloat16)
    pages = torch.zeros(2**31 // 131072 + 16, 32, 2, 16, 2, 64, dtype=torch.bfloat16)
    last = len(pages) - 1
    assert pages.numel() > 2**31
    slots = torch.arange(4) + last * 16
    query = rotary_write_kv(heads, pages, 31, slots, **options, epsilon=1e-6, backend=backend)
    small = torch.zeros(1, 1, 2, 16, 2, 64, dtype=torch.bfloat16)
    expected = rotary_write_kv(heads, small, 0, slots % 16, **options, epsilon=1e-6,
                               backend=backend)
    assert torch.equal(query, expected) and torch.equal(pages[last, 31], small[0, 0])
    copy_pages(pages, torch.tensor([last]), torch.tensor([last - 3]), backend=backend)
    assert torch.equal(pages[last - 3], pages[last])
    assert pages[: last - 3].count_nonzero() == 0


@BACKEND
def test_both_can_be_captured_in_a_graph(backend: str) -> None:
    heads, pages, slots, options = inputs(33, 4, 2, 64, 64, torch.bfloat16)
    expected, first = pages.clone(), pages.clone()
    ids = torch.tensor([[0, 1], [2, 3]])

    def step(target: Tensor) -> Tensor:
        query = rotary_write_kv(heads, target, 1, slots, **options, epsilon=1e-6, backend=backend)
        copy_pages(target, ids[0], ids[1], backend=backend)
        return query

    query = step(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(pages)
    pages.copy_(first)
    graph.replay()
    assert torch.equal(captured, query) and torch.equal(pages, expected)
