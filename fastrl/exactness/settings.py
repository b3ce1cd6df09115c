"""What exact mode sets, each with its reason, and nothing else sets.

A library picks a kernel by the number of rows. Two kernels that sum in another order give a row
other last bits, so that the log-prob of the sampler is not the one that the update computes. Exact
mode leaves the library only kernels that sum one row in one order. What cannot be set by a switch:

    products of few rows     the engine pads its passes, or a kernel of our own makes them (rows.py)
    attention                one kernel for prompts, decode steps and training, whose sums over keys
                             are cut every 512 keys from the first one on and merged in order
    LM head                  sampler and update multiply in 16 bits with float32 sums, any number
                             of rows at a time; both reduce a row of logits by the same function
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.backends import prefer

logger = logging.getLogger("fastrl")

WORKSPACES = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
"""A product that is cut along its inner dimension (split-K) keeps the parts in a workspace: eight
buffers of 16 KiB and 1 KiB have no room for them. Read once, when CUDA starts."""
ONE_KERNEL = {"packed_attention": "triton", "prefix_attention": "triton",
              "paged_attention": "triton", "sampling": "triton", "linear_logprob": "triton",
              "linear_policy_loss": "triton", "linear": "triton"}
"""File of an op -> backend that comes first on a GPU: attention in training and over pages share
their inner loop there, sampler and loss their sum over the vocabulary; `linear` is asked only for
products whose rows the library does not keep."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A switch of torch for the time of exact mode."""

    name: str
    value: Any
    """What exact mode sets."""
    reason: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]


def _reduction(kind: str) -> Setting:
    """The switch of sums in 16 bits: (rounding, split-K), or the first alone before torch 2.11."""
    name = f"allow_{kind}_reduced_precision_reduction"
    read = getattr(torch._C, f"_get_cublas_{name}")
    return Setting(
        f"torch.backends.cuda.matmul.{name}",
        (False, False) if isinstance(read(), tuple) else False,
        f"parts of a {kind} product are neither rounded to 16 bits before they are added nor cut "
        "along the inner dimension: how many parts there are depends on the rows",
        read, lambda value: setattr(torch.backends.cuda.matmul, name, value))


EVERYWHERE = (
    Setting("torch.set_float32_matmul_precision", "highest",
            "float32 products stay float32: TF32 on a GPU and bfloat16 on a CPU round the factors, "
            "and only in some kernels", torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision),
)
ON_A_GPU = (
    Setting("torch.backends.cuda.preferred_blas_library", "cublaslt",
            "cuBLASLt's choice among kernels follows the workspace, so that without one none is "
            "cut along the inner dimension; cuBLAS has a kernel of its own for single rows",
            torch.backends.cuda.preferred_blas_library,
            torch.backends.cuda.preferred_blas_library),
    _reduction("bf16"),
    _reduction("fp16"),
)


@contextmanager
def exact_math(device_type: str, *, is_exact: bool = True) -> Iterator[None]:
    """Inside the block the settings of exact mode hold; afterwards they are as before.

    Args:
        device_type: "cpu" or "cuda".
        is_exact: False changes nothing.
    """
    if not is_exact:
        yield
        return
    settings = EVERYWHERE + (ON_A_GPU if device_type == "cuda" else ())
    before = [setting.read() for setting in settings]
    try:
        for setting in settings:
            setting.write(setting.value)
        with prefer(ONE_KERNEL):
            yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.write(value)


def set_workspaces(device_type: str) -> None:
    """Set WORKSPACES for this process, where a GPU is used; warn where that comes too late.

    To be called before anything is put on the GPU. Values that the user has set stay.
    """
    if device_type != "cuda":
        return
    missing = [name for name in WORKSPACES if name not in os.environ]
    if missing and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        logger.warning(
            "exact mode: CUDA was started before %s could be set, so products may still be cut "
            "along their inner dimension and rollout and update log-probs may differ; set %s in "
            "the environment, or call fastrl.exactness.set_workspaces('cuda') before the first "
            "tensor is put on the GPU", " and ".join(missing),
            " ".join(f"{name}={WORKSPACES[name]}" for name in missing))
        return
    for name in missing:
        os.environ[name] = WORKSPACES[name]
