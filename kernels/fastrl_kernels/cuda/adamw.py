"""adamw_step on a GPU: all tensors in one launch; see csrc/adamw.cu.

    g = scale dL/dw        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - step_size m / (sqrt(v) + epsilon root)

Limits: float32, and bfloat16 with remainders; moments in float32 or 8 bits. The bits are those of
the reference on a CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastrl_kernels import multi_tensor
from fastrl_kernels.cuda import compiled_ops, stream_of


def _prepare(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], scales: Sequence[Tensor],
    factors: Tensor, beta1: float, beta2: float, decay: float, decayed: Sequence[bool],
) -> Callable[[], None]:
    """Takes all memory for a launch over contiguous tensors; what it returns launches.

    Args:
        scales: Of m and v of each parameter in turn.
        factors: See multi_tensor.adamw_factors.
    """
    rows = multi_tensor.adamw_rows(parameters, gradients, first, second, remainders, scales,
                                   decayed)
    table, chunks = multi_tensor.tensor_table(rows, tuple(p.numel() for p in parameters),
                                              factors.device)
    return partial(compiled_ops().adamw, table, chunks, factors, beta1, beta2, decay,
                   bool(remainders), bool(scales), stream_of(table))


def launch(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], scales: Sequence[Tensor],
    factors: Tensor, beta1: float, beta2: float, decay: float, decayed: Sequence[bool],
) -> None:
    """The step at once."""
    _prepare(parameters, gradients, first, second, remainders, scales, factors, beta1, beta2,
             decay, decayed)()


# What a compiled graph holds: the table is made of addresses, which a trace does not have.
_launch_op = torch.library.custom_op(
    "fastrl_cuda::adamw_step", launch,
    mutates_args=("parameters", "first", "second", "remainders", "scales"))


@_launch_op.register_fake
def _(*arguments: object) -> None:
    return None


prepare_adamw_step = partial(multi_tensor.prepare_adamw, _prepare, _launch_op)
"""fastrl.ops.adamw.prepare_adamw_step on this backend."""


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this kernel refuses, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return ("weights are float32, or bfloat16 with remainders, not "
                f"{str(dtype).removeprefix('torch.')}")
    return None
