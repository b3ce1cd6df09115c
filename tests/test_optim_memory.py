"""Allocations that fail in an optimiser step or a moving average: repeated, the same bits."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl.errors import DeviceMemoryError
from fastrl.ops import adamw
from fastrl.optim import EMA, AdamW, clip_scale

FailingAllocations: Any = runpy.run_path(
    str(Path(__file__).parent / "failing_allocations.py"))["FailingAllocations"]
SHAPES = ((40, 50), (3, 5), (7,), (), (300,), (9, 130))
KINDS = [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.float32, "8bit"),
         (torch.bfloat16, "8bit"), (torch.float64, "float32")]


def _optimizer(dtype: torch.dtype, moments: str) -> AdamW:
    """After a step; with gradients for the next. One weight is not contiguous."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weights = [draw(*shape) for shape in SHAPES] + [draw(6, 4).t()]
    optimizer = AdamW([w.requires_grad_() for w in weights], moments=moments, weight_decay=0.1)
    for _ in range(2):
        for weight in weights:
            weight.grad = draw(*weight.shape)
        if not optimizer.num_steps:
            optimizer.step(1e-2)
    return optimizer


def _state(optimizer: AdamW) -> list[Tensor]:
    tensors = [*optimizer.parameters, *optimizer.state_dict().values()]
    return [tensor.detach().clone() for tensor in tensors]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, bundles and tensors of one piece; as small as they get."""
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", {"cpu": 512})
    monkeypatch.setattr(adamw, "LEAST_PIECE_ELEMENTS", 512)


@pytest.mark.parametrize("dtype, moments", KINDS)
def test_any_allocation_of_a_step_may_fail(dtype: torch.dtype, moments: str) -> None:
    reference, scale = _optimizer(dtype, moments), torch.tensor(0.37)
    with FailingAllocations(lambda number: False) as counted:
        reference.step(1e-2, scale)
    expected = _state(reference)
    assert counted.count > 5
    for n in range(counted.count):
        optimizer = _optimizer(dtype, moments)
        with FailingAllocations(lambda number, n=n: number == n) as failing:
            optimizer.step(1e-2, scale)
        assert failing.count > n
        assert _equal(_state(optimizer), expected), n


@pytest.mark.parametrize("dtype, moments", KINDS)
def test_a_step_that_finds_no_memory_changes_nothing(dtype: torch.dtype, moments: str) -> None:
    """Whatever the allocation from which on all fail."""
    optimizer = _optimizer(dtype, moments)
    before = _state(optimizer)
    with FailingAllocations(lambda number: False) as counted:
        _optimizer(dtype, moments).step(1e-2)
    with FailingAllocations(lambda number: False) as made:
        _optimizer(dtype, moments)
    for n in range(counted.count - made.count):
        with (FailingAllocations(lambda number, n=n: number >= n),
              pytest.raises(DeviceMemoryError, match="optimizer step: expected memory .* twice")):
            optimizer.step(1e-2)
        assert _equal(_state(optimizer), before), n
    optimizer.step(1e-2)
    assert not _equal(_state(optimizer), before)


def test_pieces_are_halved_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for 1,100 floats at a time, and pieces of 2,048 elements at first."""
    monkeypatch.setattr(adamw, "PIECE_ELEMENTS", {"cpu": 2048})
    sizes, Scratch = [], adamw.Scratch

    def scratch(size: int, *args: Any, **kwargs: Any) -> Any:
        sizes.append(size)
        if size > 550:
            raise torch.OutOfMemoryError("no memory")
        return Scratch(size, *args, **kwargs)

    expected, got = (_optimizer(torch.float32, "float32") for _ in range(2))
    expected.step(1e-2)
    monkeypatch.setattr(adamw, "Scratch", scratch)
    got.step(1e-2)
    assert sizes == [2000, 1024, 512]
    assert _equal(_state(got), _state(expected))


def test_several_dtypes_are_updated_once_each_or_not_at_all() -> None:
    def make() -> AdamW:
        weights = [torch.ones(8), torch.ones(8, dtype=torch.bfloat16)]
        for weight in weights:
            weight.requires_grad_().grad = torch.ones_like(weight)
        return AdamW(weights)

    expected = make()
    with FailingAllocations(lambda number: False) as counted:
        expected.step(1e-2)
    for n in range(counted.count):
        optimizer = make()
        with FailingAllocations(lambda number, n=n: number == n):
            optimizer.step(1e-2)
        assert _equal(_state(optimizer), _state(expected)), n
    optimizer = make()
    before = _state(optimizer)
    for n in range(counted.count):
        with (FailingAllocations(lambda number, n=n: number >= n),
              pytest.raises(DeviceMemoryError, match="optimizer step: expected memory")):
            optimizer.step(1e-2)
        assert _equal(_state(optimizer), before), n


def test_the_norm_of_gradients_changes_nothing() -> None:
    optimizer = _optimizer(torch.bfloat16, "float32")
    before = _state(optimizer), [p.grad.clone() for p in optimizer.parameters]
    with (FailingAllocations(lambda number: number == 3), pytest.raises(torch.OutOfMemoryError)):
        clip_scale(optimizer.parameters, 1.0)
    assert _equal(_state(optimizer), before[0])
    assert _equal([p.grad for p in optimizer.parameters], before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_allocation_of_a_moving_average_may_fail(dtype: torch.dtype) -> None:
    def make() -> EMA:
        optimizer = _optimizer(dtype, "float32")
        average = EMA(optimizer.parameters, 0.9)
        optimizer.step(1e-2)
        return average

    expected = make()
    with FailingAllocations(lambda number: False) as counted:
        expected.update()
    for n in range(counted.count):
        average = make()
        with FailingAllocations(lambda number, n=n: number == n):
            average.update()
        assert _equal(average.averages, expected.averages), n
    assert counted.count == (dtype == torch.bfloat16)  # without conversion nothing is allocated
