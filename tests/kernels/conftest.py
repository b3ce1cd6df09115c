"""Runs of Triton's interpreter, in a process of their own: its switch is read at import."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Triton 3.6's interpreter turns arrays of one element into scalars in a way that numpy deprecates.
NUMPY_IN_INTERPRETER = "ignore:Conversion of an array with ndim:DeprecationWarning"
Runner = Callable[[str], None]


@pytest.fixture
def run_interpreted() -> Runner:
    """run_interpreted("gae"): every test of interpreted_gae.py passes under TRITON_INTERPRET=1."""

    def run(name: str) -> None:
        command = [sys.executable, "-m", "pytest", str(HERE / f"interpreted_{name}.py"), "-q",
                   "-p", "no:cacheprovider", "-W", NUMPY_IN_INTERPRETER,
                   "-o", f"python_files=interpreted_{name}.py"]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        for variable in ("FASTRL_BACKEND", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
            environment.pop(variable, None)
        done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]

    return run
