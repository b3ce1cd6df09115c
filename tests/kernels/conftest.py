"""Runs the kernels' own tests in a process of their own: Triton reads its switch at import.

The same files run in Triton's interpreter on CPU tensors and on a GPU: there tensors are made on
the GPU by default, so a test names no device.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# Triton 3.6's interpreter turns arrays of one element into scalars in a way that numpy deprecates.
NUMPY_IN_INTERPRETER = "ignore:Conversion of an array with ndim:DeprecationWarning"
DEVICE = "FASTRL_KERNEL_TESTS_ON"
Runner = Callable[[str, str], None]


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """In the process that runs kernels on a GPU, every new tensor is there."""
    if os.environ.get(DEVICE) != "cuda":
        yield
        return
    torch.set_default_device("cuda")
    yield
    torch.set_default_device("cpu")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton kernels that a test has launched, in order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    for kind in (InterpretedFunction, JITFunction):
        def run(kernel: Any, *args: Any, launch: Callable[..., Any] = kind.run, **kwargs: Any
                ) -> Any:
            names.append(kernel.fn.__name__)
            return launch(kernel, *args, **kwargs)

        monkeypatch.setattr(kind, "run", run)
    return names


@pytest.fixture
def run_kernel_tests() -> Runner:
    """run_kernel_tests("gae", "cpu"): every test of interpreted_gae.py passes on that device."""

    def run(name: str, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        command = [sys.executable, "-m", "pytest", str(HERE / f"interpreted_{name}.py"), "-q",
                   "-p", "no:cacheprovider", "-W", NUMPY_IN_INTERPRETER,
                   "-o", f"python_files=interpreted_{name}.py"]
        environment = {**os.environ, DEVICE: device, "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = "1" if device == "cpu" else "0"
        for variable in ("FASTRL_BACKEND", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
            environment.pop(variable, None)
        done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    return run
