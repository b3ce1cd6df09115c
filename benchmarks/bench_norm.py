"""The norms, forward and backward."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl import ops

N, D = 4096, 2048


# Elements of [N, D] that an ideal kernel reads and writes, forward and backward together.
@pytest.mark.parametrize("name, elements", [("rms_norm", 5), ("add_rms_norm", 8),
                                            ("layer_norm", 5), ("add_layer_norm", 8)])
@pytest.mark.parametrize("provider", ["torch"])
def test_norm(benchmark: BenchmarkFixture, provider: str, name: str, elements: int) -> None:
    is_added = name.startswith("add_")
    shapes = [(N, D)] * (1 + is_added) + [(D,)] * (1 + ("layer" in name))
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    gradients = [torch.randn(N, D) for _ in range(1 + is_added)]

    def step() -> None:
        outputs = getattr(ops, name)(*tensors, epsilon=1e-5, backend=provider)
        torch.autograd.grad(outputs if is_added else (outputs,), tensors, gradients)

    measure(benchmark, "norm", step, bytes_moved=4 * elements * N * D)
