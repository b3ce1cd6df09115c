"""Runs that are killed and continued have the weights and metrics of one that nobody killed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("kills.py")
ROOT = SCRIPT.parents[2]


def kills(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and figures; in a process of its own, whose threads have not begun."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTRL_LOG": "ERROR",
                                "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode in (0, 1) and done.stdout, done.stderr[-2000:]
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_runs_end_as_if_nothing_had_happened() -> None:
    status, figures = kills("--kills", "24", "--seed", "1")
    assert status == 0 and [row["run"] for row in figures] == ["ppo", "grpo"]
    for row in figures:
        assert row["lost"] == 0 and row["kills"] == 12, row
        assert min(row["by"].values()) >= 1, row  # every boundary, and at random


@pytest.mark.parametrize("part", ["policy_optimizer", "metrics"])
def test_a_run_that_forgets_is_lost(part: str) -> None:
    status, (row,) = kills("--kills", "6", "--runs", "grpo", "--forgets", part)
    assert status == 1 and row["lost"] >= 1
