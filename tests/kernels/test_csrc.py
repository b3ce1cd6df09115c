"""csrc/ without a GPU: its arithmetic on the CPU, its compilation, its import."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastrl_kernels.cuda import gae, kl, rewards
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.ops.gae import compute_gae_reference
from fastrl.ops.kl import kl_estimate_reference

ROOT = Path(__file__).resolve().parents[2]
OPS = {"gae", "kl_estimate", "kl_gradient", "shape_rewards"}


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The `__host__ __device__` functions, compiled for the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    library = tmp_path_factory.mktemp("arithmetic") / "arithmetic.so"
    source = ROOT / "tests/kernels/arithmetic.cpp"
    subprocess.run([compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra",
                    "-Werror", f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call_gae(function: ctypes._CFuncPtr, rewards: Tensor, values: Tensor, mask: Tensor,
             gamma: float, lam: float) -> Tensor:
    """The advantages [T] of one row by a function of arithmetic.cpp."""
    advantages = torch.full_like(rewards, float("nan"))
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (rewards, values, mask)]
    function(*pointers, ctypes.c_int64(len(rewards)), ctypes.c_float(gamma),
             ctypes.c_float(gamma * lam), ctypes.c_void_p(advantages.data_ptr()))
    return advantages


@pytest.mark.parametrize("name", ["gae_by_steps", "gae_by_scan"])
@pytest.mark.parametrize("lam", [0.95, 1.0, 0.0])
def test_gae_golden(arithmetic: ctypes.CDLL, golden: SimpleNamespace, name: str, lam: float
                    ) -> None:
    rewards, values = torch.tensor(golden.GAE_REWARDS), torch.tensor(golden.GAE_VALUES)
    got = call_gae(arithmetic[name], rewards, values, torch.ones(4, dtype=torch.bool), 1.0, lam)
    # The specification rounds lambda 0.95 to four digits.
    torch.testing.assert_close(got, torch.tensor(golden.GAE_ADVANTAGES[lam]), rtol=0, atol=6e-5)


@pytest.mark.parametrize("name", ["gae_by_steps", "gae_by_scan"])
@pytest.mark.parametrize("length, share", [(1, 1.0), (31, 0.5), (130, 0.8), (1025, 0.1), (9, 0.0)])
def test_gae_with_holes_equals_the_reference(arithmetic: ctypes.CDLL, name: str, length: int,
                                             share: float) -> None:
    rewards, values = torch.randn(2, length)
    mask = torch.rand(length) < share
    rewards[~mask] = values[~mask] = float("nan")
    exact, _ = compute_gae_reference(rewards[None].double(), values[None].double(), mask[None],
                                     gamma=0.99, lam=0.9)
    got = call_gae(arithmetic[name], rewards, values, mask, 0.99, 0.9)
    torch.testing.assert_close(got, exact[0].float(), rtol=1e-5, atol=1e-5)


def call_kl(function: ctypes._CFuncPtr, inputs: list[Tensor], outputs: list[Tensor]) -> None:
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*inputs, *outputs)]
    function(*pointers[:2], ctypes.c_int64(len(inputs[0])), *pointers[2:])


def test_kl_golden(arithmetic: ctypes.CDLL, golden: SimpleNamespace) -> None:
    inputs = [torch.tensor(golden.SHAPING_LOGPROBS), torch.tensor(golden.SHAPING_REF_LOGPROBS)]
    got = [torch.full((3,), float("nan")) for _ in range(3)]
    call_kl(arithmetic.kl_all, inputs, got)
    for one, expected in zip(got, (golden.SHAPING_K1, golden.SHAPING_K2, golden.SHAPING_K3),
                             strict=True):
        torch.testing.assert_close(one, torch.tensor(expected), rtol=0, atol=1e-7)


def test_kl_and_its_gradient_equal_the_reference(arithmetic: ctypes.CDLL) -> None:
    """Small and large differences, one beyond the clamp, and NaN, which must not be hidden."""
    logprobs = torch.cat([-torch.rand(50) * 30, torch.tensor([-100.0, -1.0, float("nan")])])
    ref_logprobs = torch.cat([-torch.rand(50) * 30, torch.tensor([-1.0, -100.0, -1.0])])
    leaves = [logprobs.clone().requires_grad_(), ref_logprobs]
    expected = kl_estimate_reference(*leaves)
    got = [torch.zeros(53) for _ in range(3)]
    call_kl(arithmetic.kl_all, [logprobs, ref_logprobs], got)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-6, atol=1e-6, equal_nan=True)
    gradients, dlogprobs = list(torch.randn(3, 53)), torch.zeros(53)
    (exact,) = torch.autograd.grad(expected, leaves[0], gradients)
    call_kl(arithmetic.kl_all_gradients, [logprobs, ref_logprobs, *gradients], [dlogprobs])
    torch.testing.assert_close(dlogprobs[:52], exact[:52], rtol=1e-5, atol=1e-5)


def test_the_cuda_callers_say_what_they_refuse() -> None:
    assert gae.supports("cpu", torch.float32) == "the tensors are on cpu"
    assert "float64" in str(gae.supports("cuda", torch.float64))
    assert gae.supports("cuda", torch.bfloat16) is None
    assert kl.supports is rewards.supports is gae.supports


def test_a_compiled_graph_knows_the_shapes() -> None:
    with FakeTensorMode():
        rewards, values = torch.empty(3, 5, dtype=torch.bfloat16), torch.empty(3, 5)
        padded = torch.ops.fastrl_cuda.compute_gae(rewards, values, None, None, 1.0, 0.95)
        offsets = torch.empty(3, dtype=torch.int64)
        packed = torch.ops.fastrl_cuda.compute_gae(values[0], values[0], None, offsets, 1.0, 0.95)
        estimates = torch.ops.fastrl_cuda.kl_estimates(values, values, None)
        shaped = torch.ops.fastrl_cuda.shaped_rewards(values[:, 0], values, values, values > 0,
                                                      0.1, 1, 3)
    assert [(list(x.shape), x.dtype) for x in padded] == [
        ([3, 5], torch.float32), ([3, 5], torch.float32), ([3, 3], torch.float64)]
    assert [list(x.shape) for x in packed] == [[5], [5], [2, 3]]
    assert [list(x.shape) for x in (*estimates, *shaped)] == [[3, 5]] * 4 + [[3, 3, 5]]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The extension, built as an installation does: `library` is its file, `report` nvcc's."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("build")
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"),
         "--build-temp", str(folder / "temp")],
        cwd=ROOT, env={**os.environ, "FASTRL_BUILD_CUDA": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(library=folder / "lib/fastrl_kernels/_C.abi3.so", report=done.stdout)


def test_every_kernel_compiles_without_spills(build: SimpleNamespace) -> None:
    for architecture in ("sm_80", "sm_90a"):
        for path in (ROOT / "csrc").glob("*.cu"):
            assert re.search(rf"entry function '\w*{path.stem}\w*' for '{architecture}'",
                             build.report), f"{path.name} has no kernel for {architecture}"
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", build.report)) == {"0"}


def test_the_extension_imports_and_registers_without_a_gpu(build: SimpleNamespace) -> None:
    """In its own process, under its own name; a CPU tensor is refused by the dispatcher."""
    code = f"""
import importlib.util, torch
spec = importlib.util.spec_from_file_location("fastrl_kernels._C", {str(build.library)!r})
importlib.util.module_from_spec(spec)
for name in {sorted(OPS)!r}:
    print(getattr(torch.ops.fastrl_cuda, name).default._schema)
x = torch.zeros(1, 1)
try:
    torch.ops.fastrl_cuda.gae(x, x, None, None, 1.0, 1.0, x, x, None, 0)
except NotImplementedError:
    print("refused")
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("fastrl_cuda::") == len(OPS) and "refused" in out.stdout


def test_the_extension_links_no_cuda_library(build: SimpleNamespace) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("needs readelf")
    out = subprocess.run(["readelf", "-d", str(build.library)], capture_output=True, text=True,
                         check=True)
    needed = re.findall(r"NEEDED.*\[(.*)\]", out.stdout)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if "cuda" in name] == []
