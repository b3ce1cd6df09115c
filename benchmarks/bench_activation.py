"""swiglu and gelu, forward and backward."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import measure
from fastrl import ops

N, I = 4096, 2048  # noqa: E741


# Elements of [N, I] that an ideal kernel reads and writes, forward and backward together.
@pytest.mark.parametrize("name, elements", [("swiglu", 8), ("gelu", 5), ("gelu_tanh", 5)])
@pytest.mark.parametrize("provider", ["torch"])
def test_activation(benchmark: BenchmarkFixture, provider: str, name: str, elements: int) -> None:
    x = torch.randn(N, 2 * I if name == "swiglu" else I, requires_grad=True)
    dy = torch.randn(N, I)

    def step() -> None:
        if name == "swiglu":
            y = ops.swiglu(x, backend=provider)
        else:
            y = ops.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none",
                         backend=provider)
        torch.autograd.grad(y, x, dy)

    measure(benchmark, "activation", step, bytes_moved=4 * elements * N * I)
