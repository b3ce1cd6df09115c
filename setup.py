"""Builds the optional CUDA extension; everything else about the package is in pyproject.toml.

`pip install .` gives a pure-Python wheel. `FASTRL_BUILD_CUDA=1 pip install --no-build-isolation .`
compiles `csrc/` as well and stops with the reason where that is not possible.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def cuda_build_requested() -> bool:
    """True when FASTRL_BUILD_CUDA is 1; anything but 0, 1 or nothing is an error."""
    value = os.environ.get("FASTRL_BUILD_CUDA", "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTRL_BUILD_CUDA: expected 0 or 1, got {value!r}")
    return value == "1"


def check_cuda_build() -> None:
    """Stop with the reason when the extension cannot be built."""
    if not sorted((ROOT / "csrc").glob("*.cu")):
        raise SystemExit(
            "FASTRL_BUILD_CUDA=1: this version has no CUDA sources in csrc/; "
            "install without it, every op runs through torch"
        )
    if shutil.which("nvcc") is None:
        raise SystemExit("FASTRL_BUILD_CUDA=1: nvcc was not found on PATH; install the CUDA "
                         "toolkit")


if cuda_build_requested():
    check_cuda_build()
setup()
