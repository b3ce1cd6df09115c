"""Fixtures of the trainers' tests."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def task() -> SimpleNamespace:
    """The tiny PPO task of ppo_task.py under one name."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ppo_task.py"))))
