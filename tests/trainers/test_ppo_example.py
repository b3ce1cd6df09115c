"""The example runs, and its policy learns."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples/ppo_tiny.py"


def test_example_learns(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = re.search(r"vowels ([\d.]+) -> ([\d.]+).*wins ([\d.]+)", capsys.readouterr().out)
    assert found is not None
    before, after, wins = map(float, found.groups())
    assert after > before + 0.3 and wins > 0.7
