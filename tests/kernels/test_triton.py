"""Every Triton kernel file against its reference: in Triton's interpreter, and on a GPU.

The tests themselves are in `interpreted_<file>.py`, one for each kernel file.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = sorted(p.stem.removeprefix("interpreted_") for p in HERE.glob("interpreted_*.py"))
KERNELS = sorted(p.stem for p in (HERE.parents[1] / "kernels/fastrl_kernels/triton").glob("*.py")
                 if p.stem not in ("__init__", "support"))
TOGETHER = {"decoder"}
"""Tests of several kernels in their place."""


def test_every_kernel_file_has_tests() -> None:
    assert sorted(set(NAMES) - TOGETHER) == KERNELS


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(run_kernel_tests: Callable[[str, str], None], name: str) -> None:
    run_kernel_tests(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(run_kernel_tests: Callable[[str, str], None], name: str) -> None:
    run_kernel_tests(name, "cuda")
