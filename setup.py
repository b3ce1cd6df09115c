"""Builds the optional CUDA extension; everything else about the package is in pyproject.toml.

`pip install .` gives a pure-Python wheel. `FASTRL_BUILD_CUDA=1 pip install --no-build-isolation .`
compiles `csrc/` as well and stops with the reason where that is not possible. TORCH_CUDA_ARCH_LIST
restricts it to some architectures, as it does for torch's own extensions. nvcc is called here,
because a CPU build of torch reports no CUDA home even where nvcc is present.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = ("80", "90a", "100")
# Stable ABI of torch 2.11: the extension runs with that version and every later one.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
PYTHON_TARGET = "-DPy_LIMITED_API=0x030b0000"
FLAGS = ("-std=c++20", "-O3", "-Werror", "all-warnings",
         "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror,-fvisibility=hidden", "-Xptxas", "-v")


def cuda_build_requested() -> bool:
    """True when FASTRL_BUILD_CUDA is 1; anything but 0, 1 or nothing is an error."""
    value = os.environ.get("FASTRL_BUILD_CUDA", "0")
    if value not in ("", "0", "1"):
        raise SystemExit(f"FASTRL_BUILD_CUDA: expected 0 or 1, got {value!r}")
    return value == "1"


def check_cuda_build() -> None:
    """Stop with the reason when the extension cannot be built."""
    if shutil.which("nvcc") is None:
        raise SystemExit("FASTRL_BUILD_CUDA=1: nvcc was not found on PATH; install the CUDA "
                         "toolkit")
    if importlib.util.find_spec("torch") is None:
        raise SystemExit("FASTRL_BUILD_CUDA=1: torch was not found; install it first and add "
                         "--no-build-isolation")


def gencode() -> list[str]:
    """nvcc's options: what TORCH_CUDA_ARCH_LIST names, else what this nvcc knows of ours."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if named:
        return [gencode_of(entry) for entry in named]
    listed = subprocess.run(["nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True)
    known = listed.stdout.split()
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES
            if f"sm_{arch.removesuffix('a')}" in known]


def gencode_of(entry: str) -> str:
    """nvcc's option for one entry of TORCH_CUDA_ARCH_LIST: 8.0, 9.0a or, with PTX, 9.0+PTX."""
    match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
    if match is None:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 9.0+PTX, "
                         f"got {entry!r}")
    arch = match[1] + match[2]
    code = f"[sm_{arch},compute_{arch}]" if match[3] else f"sm_{arch}"
    return f"-gencode=arch=compute_{arch},code={code}"


def compile_source(source: Path, target: Path, options: list[str]) -> None:
    """Compile one file; on success nvcc's report (registers, spills) goes to standard output."""
    command = ["nvcc", "-c", str(source), "-o", str(target), *FLAGS, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout + done.stderr, flush=True)
    if done.returncode != 0:
        raise SystemExit(f"{source.name}: nvcc failed:\n{' '.join(command)}")


class BuildCUDA(build_ext):
    """Compiles csrc/ with nvcc, one process per file, and links without torch's CUDA libraries."""

    def build_extension(self, ext: Extension) -> None:
        import torch

        torch_dir = Path(torch.__file__).parent
        includes = ["-isystem", str(torch_dir / "include"),
                    "-isystem", sysconfig.get_paths()["include"]]
        options = {".cu": gencode(), ".cpp": [TORCH_TARGET, PYTHON_TARGET, *includes]}
        sources = [ROOT / source for source in ext.sources]
        objects = [Path(self.build_temp) / f"{source.stem}.o" for source in sources]
        Path(self.build_temp).mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            list(pool.map(lambda s, o: compile_source(s, o, options[s.suffix]), sources, objects))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["nvcc", "-shared", "-cudart", "static", *map(str, objects), "-o",
                        str(target), f"-L{torch_dir / 'lib'}", "-ltorch_cpu", "-ldl"], check=True)


def cuda_extension() -> Extension:
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.c*")
                     if path.suffix in (".cu", ".cpp"))
    return Extension("fastrl_kernels._C", sources, py_limited_api=True)


if cuda_build_requested():
    check_cuda_build()
    setup(ext_modules=[cuda_extension()], cmdclass={"build_ext": BuildCUDA},
          options={"bdist_wheel": {"py_limited_api": "cp311"}})
else:
    setup()
