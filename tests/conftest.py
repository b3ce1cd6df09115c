"""What every test gets: fixed seeds, one thread, NaN in fresh memory, and no network."""

import os
import random
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pytest
import torch
import torch._dynamo  # notes torch's functions by identity, so before torch.empty is replaced

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"

torch.set_num_threads(1)
with torch.device("cpu"):
    torch.empty(0)  # torch now remembers the real functions for `with torch.device("meta")`


def shared_folder(folder: Path, *, must_exist: bool) -> Path:
    """`folder`, or a skip with the reason; where it must exist, a failure."""
    if folder.is_dir():
        return folder
    reason = "needs ../shared (models and data beside the repository)"
    if must_exist:
        pytest.fail(f"{reason}, and CI=true says it has to be there")
    pytest.skip(reason)


@pytest.fixture
def shared() -> Path:
    """The folder of models and data beside the repository; skips where there is none."""
    return shared_folder(SHARED, must_exist=False)


@pytest.fixture
def required_shared() -> Path:
    """The same folder for tests that CI must not skip: without it they fail where CI=true."""
    return shared_folder(SHARED, must_exist=os.environ.get("CI") == "true")


@pytest.fixture(scope="session")
def golden() -> SimpleNamespace:
    """The constants of tests/golden.py as attributes."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("golden.py"))))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def _fills_with_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, but fastrl's own code gets NaN (integers: the minimum)."""

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("fastrl"):
            return tensor
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)

    return filled


@pytest.fixture(autouse=True)
def nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """An element of torch.empty that is read before it is written shows up as NaN."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _fills_with_nan(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", _fills_with_nan(torch.Tensor.new_empty))
