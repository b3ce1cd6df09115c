"""Every Triton kernel file against its reference: in Triton's interpreter, and on a GPU.

The tests themselves are in `interpreted_<file>.py`, one for each kernel file.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NAMES = sorted(p.stem.removeprefix("interpreted_") for p in HERE.glob("interpreted_*.py"))
FOLDER = HERE.parents[1] / "kernels/fastrl_kernels/triton"
KERNELS = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "support"))
TOGETHER = {"decoder", "exact_products", "host_reads", "paged_prefixes"}
"""Tests of several kernels in their place."""


def test_every_kernel_file_has_tests() -> None:
    assert sorted(set(NAMES) - TOGETHER) == KERNELS


@pytest.mark.parametrize("name", KERNELS)
def test_every_op_is_compiled_and_passes_opcheck(name: str) -> None:
    """By the text of its tests, so that none is forgotten."""
    source, tests = FOLDER / f"{name}.py", (HERE / f"interpreted_{name}.py").read_text()
    assert "fullgraph=True" in tests
    for op in re.findall(r'custom_op\(\s*"fastrl_kernels::(\w+)"', source.read_text()):
        assert re.search(rf"opcheck\(\s*[\w.]+\.{op},", tests), f"{op} is not given to opcheck"


def test_no_kernel_adds_with_atomics() -> None:
    """Sums of a fixed order give the same bits every time."""
    for path in FOLDER.glob("*.py"):
        assert "tl.atomic" not in path.read_text(), path.name


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_in_the_interpreter(run_kernel_tests: Callable[[str, str], None], name: str) -> None:
    run_kernel_tests(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(run_kernel_tests: Callable[[str, str], None], name: str) -> None:
    run_kernel_tests(name, "cuda")
