"""adamw_step of a model's matrices and vectors, in the four ways that the state is stored."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from fastrl.ops import adamw_step
from fastrl.ops.adamw import adamw_step_reference
from fastrl.state_formats import decode_moment, encode_moment, split_master

SETTINGS: dict[str, Any] = {"learning_rate": 1e-4, "betas": (0.9, 0.95), "epsilon": 1e-8}
BYTES = {"float32": 28, "bf16": 26, "float32_8bit": 16, "bf16_8bit": 14}


def inputs(K: int, D: int, dtype: torch.dtype, kind: str) -> Inputs:
    given: Inputs = {"step": torch.tensor(10)}
    for i, shape in enumerate([(D, D)] * K + [(D,)] * K):
        weight, m, root = torch.randn(shape), 1e-2 * torch.randn(shape), torch.rand(shape) + 1e-2
        if kind.startswith("bf16"):
            weight, given[f"remainder{i}"] = split_master(weight)
        given |= {f"weight{i}": weight, f"gradient{i}": torch.randn_like(weight),
                  f"first{i}": m, f"second{i}": root.square()}
        if kind.endswith("8bit"):
            for name, values, signed in (("first", m, True), ("second", root, False)):
                codes, given[f"{name}_scale{i}"] = encode_moment(values.view(-1), signed=signed)
                given[f"{name}{i}"] = codes.view(shape)
    return given


def update(op: Op, step: Tensor, **given: Tensor) -> list[Tensor]:
    """The new weights. In float64, for the truth, bits and codes become numbers first."""
    weights, gradients, first, second, remainders, first_scales, second_scales = (
        [given[f"{name}{i}"] for i in range(len(given)) if f"{name}{i}" in given]
        for name in ("weight", "gradient", "first", "second", "remainder", "first_scale",
                     "second_scale"))
    if weights[0].dtype == torch.float64:
        if first_scales:
            first, second = ([decode_moment(c.view(-1), s).view(c.shape).double()
                              for c, s in zip(codes, scales, strict=True)]
                             for codes, scales in ((first, first_scales), (second, second_scales)))
            second = [root.square() for root in second]
        remainders, first_scales, second_scales = [], [], []
    op(weights, gradients, first, second, remainders, step=step,
       moment_scales=list(zip(first_scales, second_scales, strict=True)), **SETTINGS)
    return weights


def fused(weights: list[Tensor], gradients: list[Tensor], first: list[Tensor],
          second: list[Tensor], remainders: list[Tensor], *, step: Tensor, **others: Any) -> None:
    """torch's fused kernel."""
    torch._fused_adamw_(
        weights, gradients, first, second, [], [step.float() for _ in weights],
        lr=SETTINGS["learning_rate"], beta1=0.9, beta2=0.95, weight_decay=0.0, eps=1e-8,
        amsgrad=False, maximize=False)


CASES = [
    Case(op=adamw_step, name=kind, reference=adamw_step_reference,
         inputs=partial(inputs, kind=kind), run=update,
         cpu={"K": 14, "D": 1024}, gpu={"K": 64, "D": 4096}, small={"K": 2, "D": 20},
         dtype=dtype, gpu_dtype=dtype, compared={"K": 2},
         bytes_moved=lambda K, D, dtype, size=size: size * K * (D * D + D),
         others={"fused": fused} if kind == "float32" else {},
         not_compiled="the torch path goes piece by piece through a CPU's cache")
    for kind, size in BYTES.items()
    for dtype in [torch.bfloat16 if kind.startswith("bf16") else torch.float32]
]
