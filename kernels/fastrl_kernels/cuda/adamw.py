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


@torch.no_grad()
def prepare_adamw_step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor] = (), *, step: Tensor,
    learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float = 0.0,
    decayed: Sequence[bool] | None = None, scale: Tensor | None = None,
    moment_scales: Sequence[tuple[Tensor, Tensor]] = (),
) -> Callable[[], None]:
    """fastrl.ops.adamw.prepare_adamw_step on this backend."""
    weights = [p.contiguous() for p in parameters]
    arguments = (
        weights, [g.contiguous() for g in gradients], first, second, remainders,
        [s for pair in moment_scales for s in pair],
        multi_tensor.adamw_factors(step, learning_rate, betas, epsilon, scale), *betas,
        1 - learning_rate * weight_decay,
        [True] * len(weights) if decayed is None else decayed)
    is_compiling = torch.compiler.is_compiling()
    run = partial(_launch_op, *arguments) if is_compiling else _prepare(*arguments)

    def update(kept: object = arguments) -> None:  # a table only has addresses
        run()
        if not is_compiling:  # autograd refuses whoever still needs the old weights
            torch.autograd.graph.increment_version(parameters)
        for parameter, weight in zip(parameters, weights, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(weight)

    return update


def supports(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this kernel refuses, or None."""
    if device_type != "cuda":
        return f"the tensors are on {device_type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return ("weights are float32, or bfloat16 with remainders, not "
                f"{str(dtype).removeprefix('torch.')}")
    return None
