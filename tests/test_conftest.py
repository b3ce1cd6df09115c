"""The fixtures that other tests trust."""

import random
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.mark.parametrize("allocate", [
    "torch.empty(2, 3)", "torch.empty_like(torch.ones(2, 3))", "torch.ones(1).new_empty(2, 3)",
    "torch.empty_strided((2, 3), (3, 1))", "torch.empty(2, dtype=torch.bfloat16)",
])
def test_fresh_memory_of_fastrl_is_nan(allocate: str) -> None:
    inside = eval(allocate, {"torch": torch, "__name__": "fastrl.somewhere"})
    assert inside.isnan().all()
    eval(allocate, {"torch": torch, "__name__": "torch.somewhere"})  # left alone: cannot fail


def test_fresh_integers_are_far_out_of_range() -> None:
    inside = eval("torch.empty(2, dtype=torch.int64)", {"torch": torch, "__name__": "fastrl.ops"})
    assert (inside == torch.iinfo(torch.int64).min).all()


@pytest.mark.parametrize("run", [1, 2])
def test_seeds_are_fixed(run: int) -> None:
    """Both runs see the same numbers."""
    drawn = random.random(), np.random.rand(), torch.rand(()).item()
    assert drawn == pytest.approx((0.8444218515250481, 0.5488135039273248, 0.4962565898895264))


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


def test_a_missing_shared_folder_skips_or_fails(tmp_path: Path) -> None:
    shared_folder = runpy.run_path(str(Path(__file__).with_name("conftest.py")))["shared_folder"]
    assert shared_folder(tmp_path, must_exist=True) == tmp_path
    with pytest.raises(pytest.skip.Exception, match="needs ../shared"):
        shared_folder(tmp_path / "missing", must_exist=False)
    with pytest.raises(pytest.fail.Exception, match="CI=true"):
        shared_folder(tmp_path / "missing", must_exist=True)
