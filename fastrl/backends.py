"""Which implementation of an op runs: `auto`, `triton`, `cuda`, `torch` or `flash`, and why.

Order of decision: argument `backend=`, then `with use_backend(...)`, then the environment variable
FASTRL_BACKEND, then "auto". A name given explicitly never falls back: it runs or raises. "auto"
walks the op's PREFERENCE and logs once per op, device and dtype what it took and why others were
refused. Kernels live in `fastrl_kernels/<backend>/<file of the op>.py`, each with
`supports(device_type, dtype) -> str | None`, the reason for refusing. `flash` is not ours: its file
calls the package flash_attn.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from fastrl.errors import BackendUnavailableError, ConfigError

BACKENDS = ("cuda", "triton", "torch")
LIBRARIES = {"flash": "flash_attn"}
"""Backends that another project's package provides for a few ops, and its import name."""
NAMES = ("auto", *BACKENDS, *LIBRARIES)

logger = logging.getLogger("fastrl")
_current: ContextVar[str | None] = ContextVar("fastrl_backend", default=None)
_preferred: ContextVar[Mapping[str, str]] = ContextVar("fastrl_preferred", default={})  # noqa: B039
_chosen: dict[tuple[str, str, torch.dtype], str] = {}


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One line of `fastrl doctor`: can this backend run this op here?"""

    op: str
    backend: str
    status: str
    """"chosen" (auto takes it), "available" or "unavailable"."""
    reason: str
    """Why it cannot run; empty where it can."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    reason: str
    remedy: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on the backend `name`, where an op call names none itself.

    Args:
        name: auto, cuda, triton, torch or flash.
    Raises:
        ConfigError: when there is no such backend.
    Example:
        >>> with use_backend("torch"):
        ...     choose("whiten", "whiten", ("torch",), "cpu", torch.float32)
        'torch'
    """
    token = _current.set(_known(name, "use_backend"))
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def prefer(backends: Mapping[str, str]) -> Iterator[None]:
    """Inside the block "auto" asks these backends first, and the others where they cannot run.

    Args:
        backends: File of an op (`kernel` of `choose`) -> backend.
    """
    token = _preferred.set(backends)
    try:
        yield
    finally:
        _preferred.reset(token)


def choose(
    op: str, kernel: str, preference: tuple[str, ...], device_type: str, dtype: torch.dtype,
    backend: str | None = None, limits: tuple[tuple[str, str], ...] = (),
) -> str:
    """The name of the backend that runs `op` now.

    A compiled graph keeps the name that was chosen while it was traced.

    Args:
        op: Name of the public function, for messages.
        kernel: Name of its file, in `fastrl/ops` and in `fastrl_kernels/<backend>`.
        preference: Backends that have the op, best first; always ends with "torch".
        device_type: Where the tensors live: "cpu", "cuda".
        dtype: Their floating point type.
        backend: What the caller asked for; None follows use_backend, then FASTRL_BACKEND.
        limits: (backend, reason) of those that these sizes rule out.
    Raises:
        BackendUnavailableError: when a backend is named that cannot run.
        ConfigError: when there is no backend of that name.
    """
    requested = _requested(backend)
    if requested == "auto" and device_type == "cpu" and (op, device_type, dtype) in _chosen:
        return "torch"  # auto takes nothing else there, and a decode step asks 30 times
    too_big = dict(limits)

    def refusal_of(name: str, interpreted: bool) -> _Refusal | None:
        refusal = _refusal(kernel, preference, name, device_type, dtype, interpreted)
        if refusal is None and name in too_big:
            return _Refusal(too_big[name], "")
        return refusal

    if requested != "auto":
        refusal = refusal_of(requested, _interpreted())
        if refusal is not None:
            works = [name for name in (*BACKENDS, *LIBRARIES)
                     if refusal_of(name, _interpreted()) is None]
            raise _unavailable(op, requested, refusal, works, _reach(backend))
        return requested
    refusals: dict[str, str] = {}
    first = _preferred.get().get(kernel)
    for name in sorted(preference, key=lambda name: name != first):
        refusal = refusal_of(name, False)
        if refusal is None:
            _log_once(op, name, device_type, dtype, refusals)
            return name
        refusals[name] = refusal.reason
    raise AssertionError(f"PREFERENCE of {op} does not end with torch: {preference}")


# The mark that torch.compiler.assume_constant_result sets. Calling it here would import all of
# torch._dynamo, which takes longer than the rest of torch.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def chosen_backends() -> dict[str, str]:
    """What "auto" has taken so far: op, device and dtype -> backend, for a run's first metrics."""
    return {
        f"{op} {device_type} {str(dtype).removeprefix('torch.')}": name
        for (op, device_type, dtype), name in sorted(_chosen.items(), key=str)
    }


def backend_table(
    operations: ModuleType, device_type: str, dtype: torch.dtype = torch.float32
) -> list[BackendStatus]:
    """Every op with every backend: what "auto" would take, what could run, why others cannot.

    A library's backend has a line only at the ops that call it.

    Args:
        operations: `fastrl.ops`; its `__all__` is searched for functions with a PREFERENCE.
        device_type: Where the tensors would live: "cpu" or "cuda".
        dtype: Their floating point type.
    """
    table = []
    for op in operations.__all__:
        function = getattr(operations, op)
        module = importlib.import_module(function.__module__)
        preference = getattr(module, "PREFERENCE", None)
        if isinstance(function, type) or preference is None:
            continue  # a Stats class
        kernel = module.__name__.rpartition(".")[2]
        is_taken = False
        for name in (*preference, *(b for b in BACKENDS if b not in preference)):
            refusal = _refusal(kernel, preference, name, device_type, dtype, False)
            can_run = "available" if is_taken else "chosen"
            is_taken = is_taken or refusal is None
            table.append(BackendStatus(
                op, name, can_run if refusal is None else "unavailable",
                "" if refusal is None else refusal.reason,
            ))
    return table


def _requested(backend: str | None) -> str:
    """The name that counts, from argument, context and environment."""
    if backend is not None:
        return _known(backend, "backend")
    current = _current.get()
    if current is not None:
        return current
    return _known(os.environ.get("FASTRL_BACKEND") or "auto", "FASTRL_BACKEND")


def _reach(backend: str | None) -> str:
    """What to know of a name that was given for every operation at once; "" for an argument."""
    if backend is not None:
        return ""
    origin = "FASTRL_BACKEND" if _current.get() is None else "use_backend"
    return (f" {origin} asks it of every operation; backend= of a call asks it of one, and "
            "`fastrl doctor` shows who has it.")


def _known(name: str, origin: str) -> str:
    if name not in NAMES:
        raise ConfigError(f"{origin}: expected one of {', '.join(NAMES)}, got {name!r}; change it")
    return name


def _interpreted() -> bool:
    """True when Triton kernels run on CPU tensors, by Triton's own switch."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _refusal(
    kernel: str, preference: tuple[str, ...], backend: str, device_type: str, dtype: torch.dtype,
    interpreted: bool,
) -> _Refusal | None:
    """Why `backend` cannot run the op, or None. A package is looked up, never tried."""
    if backend == "torch":
        return None
    if backend not in preference:
        return _Refusal(f"this version has no {backend} kernel for it", "")
    library = LIBRARIES.get(backend)
    if library is not None and importlib.util.find_spec(library) is None:
        return _Refusal(f"package {library} is not installed",
                        f"Install fastrl with the {library.replace('_', '-')} extra")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        return _Refusal("package triton is not installed", "Install triton (Linux only)")
    if backend == "cuda" and importlib.util.find_spec("fastrl_kernels._C") is None:
        return _Refusal(
            "the extension fastrl_kernels._C is not built",
            "Build it with FASTRL_BUILD_CUDA=1 pip install --no-build-isolation .",
        )
    if device_type != "cuda" and not (backend == "triton" and interpreted and device_type == "cpu"):
        return _Refusal(f"the tensors are on {device_type}", "Move them to a GPU")
    module = importlib.import_module(f"fastrl_kernels.{backend}.{kernel}")
    reason = module.supports(device_type, dtype)
    return None if reason is None else _Refusal(reason, "")


def _unavailable(
    op: str, backend: str, refusal: _Refusal, works: list[str], reach: str
) -> BackendUnavailableError:
    """The error for a named backend: reason, remedy, what would work, and whom the name reaches."""
    remedy = f"{refusal.remedy}, or use" if refusal.remedy else "Use"
    return BackendUnavailableError(
        f"{op}: backend {backend!r} cannot run here: {refusal.reason}. {remedy} a backend that "
        f"would work: {', '.join(works)}.{reach}"
    )


def _log_once(
    op: str, name: str, device_type: str, dtype: torch.dtype, refusals: dict[str, str]
) -> None:
    """Say what "auto" took; loudly when a GPU gets the slow path though a kernel exists."""
    key = (op, device_type, dtype)
    if _chosen.get(key) == name:
        return
    _chosen[key] = name
    is_slow = name == "torch" and device_type == "cuda" and bool(refusals)
    why = "".join(f"; {other} refused: {reason}" for other, reason in refusals.items())
    logger.log(
        logging.WARNING if is_slow else logging.INFO,
        "%s on %s %s: %s%s", op, device_type, str(dtype).removeprefix("torch."), name, why,
    )
