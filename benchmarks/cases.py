"""How a bench file declares what is measured: one `Case` for each way of calling an op.

Two drivers read the same declaration: pytest-benchmark (`pytest benchmarks`) and `python -m
benchmarks kernels`, which interleaves the providers and times by device events on a GPU.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.backends import BACKENDS, LIBRARIES

ROOT = Path(__file__).resolve().parents[1]
Op = Callable[..., Any]
Inputs = dict[str, Any]
FLOORS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Error, as a share of the largest value, that is allowed beside twice the error of plain torch."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way of calling one op. `sizes` stands for the numbers of `cpu`, `gpu` or `small`."""

    op: Op
    """The public function of fastrl.ops."""
    reference: Op
    """Its plain-torch reference: in float64 the truth that every provider is held to."""
    inputs: Callable[..., Inputs]
    """inputs(dtype=..., **sizes): random tensors by name, on the default device."""
    run: Callable[..., Any]
    """run(op, **inputs): what is timed. Returns the tensors that are compared."""
    cpu: Mapping[str, int]
    """Sizes on a CPU."""
    gpu: Mapping[str, int]
    """Reference sizes on a GPU (docs/benchmarks.md)."""
    small: Mapping[str, int]
    """Sizes for trying the flow: tests, memory checkers."""
    name: str = ""
    """Tells cases of one op apart."""
    dtype: torch.dtype = torch.float32
    """Of the inputs on a CPU, as `inputs` understands it."""
    gpu_dtype: torch.dtype = torch.float32
    gradients: tuple[str, ...] = ()
    """Inputs that need a gradient, which `run` takes with torch.autograd.grad."""
    bytes_moved: Callable[..., int] = lambda **_: 0
    """bytes_moved(dtype=..., **sizes): what an ideal kernel reads and writes."""
    flops: Callable[..., int] = lambda **_: 0
    """flops(dtype=..., **sizes): operations of an ideal kernel, in the matrix units."""
    compared: Mapping[str, int] = field(default_factory=dict)
    """Sizes that are smaller while results are compared, where the truth takes too much memory."""
    others: Mapping[str, Op] = field(default_factory=dict)
    """Provider name -> function like the reference: plain ways and libraries. A name that begins
    with a backend and "_" is another way of that backend."""
    not_compiled: str = ""
    """Why torch.compile is left out, where it is."""
    agree: Callable[..., str | None] | None = None
    """In place of `disagreement`, for results that are not numbers with an error."""

    @property
    def op_name(self) -> str:
        """Name of the public function."""
        return str(self.op.__name__)

    @property
    def file(self) -> str:
        """Name of the op's file in fastrl/ops."""
        return str(self.op.__module__).rpartition(".")[2]

    def sizes(self, device: str, small: bool) -> dict[str, int]:
        """The sizes that a driver uses."""
        return dict(self.small if small else self.gpu if device == "cuda" else self.cpu)

    def dtype_on(self, device: str) -> torch.dtype:
        """Type of the inputs on a device."""
        return self.gpu_dtype if device == "cuda" else self.dtype


@dataclass(frozen=True)
class Provider:
    """Somebody who can run a case: `op` is called as the reference is; None where it cannot."""

    name: str
    op: Op | None
    reason: str = ""
    """Why it cannot."""

    @property
    def backend(self) -> str | None:
        """The backend in its name: triton of "triton" and of "triton_no_logits"."""
        first = self.name.split("_")[0]
        return first if first in BACKENDS else None


def load_cases(names: Iterable[str] = ()) -> list[Case]:
    """The cases of every op file, or of those named by file or by function.

    Raises:
        SystemExit: when there is no op of a name.
    """
    files = sorted(p.stem for p in (ROOT / "fastrl/ops").glob("*.py") if p.stem != "__init__")
    modules = (importlib.import_module(f"benchmarks.bench_{file}") for file in files)
    cases = [case for module in modules for case in module.CASES]
    wanted = set(names)
    known = {name for case in cases for name in (case.op_name, case.file)}
    if wanted - known:
        raise SystemExit(f"no bench of {', '.join(sorted(wanted - known))}; known: "
                         f"{', '.join(sorted(known))}")
    return [c for c in cases if not wanted or c.op_name in wanted or c.file in wanted]


def make_inputs(case: Case, sizes: Mapping[str, int], device: str, seed: int) -> Inputs:
    """Random inputs that depend on case, sizes, device and seed alone."""
    torch.manual_seed(seed)
    with torch.device(device):
        inputs = case.inputs(dtype=case.dtype_on(device), **sizes)
    return with_gradients(case, inputs)


def with_gradients(case: Case, inputs: Inputs) -> Inputs:
    """The same inputs, those of `gradients` as leaves that need one."""
    return {name: value.detach().requires_grad_() if name in case.gradients else value
            for name, value in inputs.items()}


def providers(case: Case, wanted: Iterable[str] = (), without: Iterable[str] = ()
              ) -> list[Provider]:
    """Who can run a case, torch first; all of them, or the `wanted`, but none of `without`."""
    preference = importlib.import_module(case.op.__module__).PREFERENCE
    kernels = (name for name in ("triton", "cuda", *LIBRARIES) if name in preference)
    names = ["torch", "compile", *kernels, *case.others]
    chosen = (set(wanted) or set(names)) - set(without)
    return [_provider(case, name) for name in names if name in chosen]


def _provider(case: Case, name: str) -> Provider:
    if name in case.others:
        if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
            return Provider(name, None, "package liger_kernel is not installed")
        return Provider(name, case.others[name])
    if name != "compile":
        return Provider(name, partial(case.op, backend=name))
    if case.not_compiled:
        return Provider(name, None, case.not_compiled)
    return Provider(name, torch.compile(partial(case.op, backend="torch"), dynamic=False))


def call(case: Case, op: Op, inputs: Inputs) -> list[Tensor]:
    """The results of one run, as a list of tensors."""
    results = case.run(op, **inputs)
    return [results] if isinstance(results, Tensor) else list(results)


def check(case: Case, provider: Provider, sizes: Mapping[str, int], device: str) -> str | None:
    """What is wrong with a provider's results on fresh inputs, or None.

    Raises:
        BackendUnavailableError: when the provider is a backend that cannot run here.
    """
    assert provider.op is not None
    sizes = {**sizes, **{k: min(v, sizes[k]) for k, v in case.compared.items()}}
    inputs = make_inputs(case, sizes, device, seed=0)
    wide = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in inputs.items()}
    truth = call(case, case.reference, with_gradients(case, wide))
    plain = call(case, case.reference, make_inputs(case, sizes, device, seed=0))
    results = call(case, provider.op, inputs)
    if provider.backend is not None:
        ran = backends_that_ran(
            lambda: call(case, provider.op, make_inputs(case, sizes, device, seed=0)))
        if ran != ({provider.backend} - {"torch"}):
            found = ", ".join(sorted(ran)) or "torch"
            return f"asked for {provider.backend}, but code of {found} ran"
    agree = case.agree or disagreement
    return agree(results, truth, plain, FLOORS[case.dtype_on(device)])


def disagreement(
    results: list[Tensor], truth: list[Tensor], plain: list[Tensor], floor: float
) -> str | None:
    """Why results are wrong: an error above twice that of plain torch plus a floor, or None."""
    if len(results) != len(truth):
        return f"{len(results)} results where the reference has {len(truth)}"
    for number, (ours, exact, torchs) in enumerate(zip(results, truth, plain, strict=True)):
        if ours.shape != exact.shape:
            return f"result {number}: shape {list(ours.shape)}, expected {list(exact.shape)}"
        finite = exact.isfinite()
        if not torch.equal(ours.isfinite(), finite):
            return f"result {number}: not finite in other places than the reference"
        scale = exact[finite].abs().max().clamp(min=1e-30) if finite.any() else exact.new_ones(())
        error, allowed = (((x - exact)[finite].abs().max() / scale).item() if finite.any() else 0.0
                          for x in (ours.double(), torchs.double()))
        if not error <= 2 * allowed + floor:
            return (f"result {number}: error {error:.2e} of the largest value, allowed "
                    f"2 * {allowed:.2e} + {floor:.0e}")
    return None


def backends_that_ran(function: Callable[[], object]) -> set[str]:
    """Backends of fastrl_kernels whose Python code a call enters, on this thread.

    A fallback would be timed as the kernel it stands in for: this is how it shows.
    """
    seen: set[str] = set()

    def watch(frame: Any, event: str, argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if (event == "call" and module.startswith("fastrl_kernels.")
                and frame.f_code.co_name != "supports"):
            seen.update({module.split(".")[1]} & set(BACKENDS))  # not what backends share

    sys.setprofile(watch)
    try:
        function()
    finally:
        sys.setprofile(None)
    return seen

