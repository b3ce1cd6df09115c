"""adamw_step: the optimiser's pass over weights, gradients and moments.

    g = scale dL/dw        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w (1 - lr wd) - step_size m / (sqrt(v) + epsilon root)
    root = sqrt(1 - b2^t)        step_size = lr root / (1 - b1^t)

The last line is bias correction with the constants moved out of the elements. Every product and sum
is rounded by itself, in this order, so that torch on any CPU and the kernels give the same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fastrl.adamw_piece import Factors, Scratch, factors_of, update_piece
from fastrl.backends import choose
from fastrl.checks import check_device, check_like, check_not_negative, check_positive, wide_dtype
from fastrl.errors import ShapeError
from fastrl.out_of_memory import is_out_of_memory
from fastrl.state_formats import BLOCK_SIZE, code_dtype, num_blocks

# Order by measurement; no GPU result yet, so "auto" keeps the proven path.
PREFERENCE = ("torch", "triton", "cuda")

# Elements of one pass: what a CPU's second-level cache holds with two temporaries; elsewhere what
# bounds those to some hundred MiB. Multiples of BLOCK_SIZE.
PIECE_ELEMENTS = {"cpu": 1 << 16}
LARGE_PIECE_ELEMENTS = 1 << 26
LEAST_PIECE_ELEMENTS = 1 << 12  # of a pass where memory is short

Scales = Sequence[tuple[Tensor, Tensor]]
Update = Callable[[], None]


@torch.no_grad()
def adamw_step_reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor] = (), *, step: Tensor,
    learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float = 0.0,
    decayed: Sequence[bool] | None = None, scale: Tensor | None = None,
    moment_scales: Scales = (),
) -> None:
    """adamw_step in plain torch, in pieces whose temporaries stay in a CPU's cache."""
    _prepare_reference(
        parameters, gradients, first, second, remainders, step=step, learning_rate=learning_rate,
        betas=betas, epsilon=epsilon, weight_decay=weight_decay, decayed=decayed, scale=scale,
        moment_scales=moment_scales)()


def _prepare_reference(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], *, step: Tensor, learning_rate: float,
    betas: tuple[float, float], epsilon: float, weight_decay: float,
    decayed: Sequence[bool] | None, scale: Tensor | None, moment_scales: Scales,
) -> Update:
    """Takes all memory, where it is short for smaller pieces; what it returns takes none."""
    decayed = [True] * len(parameters) if decayed is None else decayed
    if weight_decay == 0:
        decayed = [False] * len(parameters)  # one bundle instead of two
    factors = factors_of(wide_dtype(parameters[0].dtype), step, learning_rate, betas, epsilon,
                       weight_decay, scale)
    columns = [parameters, gradients, first, second, *([remainders] if remainders else [])]
    numels = [x.numel() for x in parameters]
    limit, bundles, scratch, joined = _take_memory(columns, numels, decayed, bool(moment_scales))
    bundled = {i for bundle in bundles for i in bundle}
    flat = {i: [column[i].reshape(-1) for column in columns]
            for i in range(len(numels)) if i not in bundled}

    def update() -> None:
        for i, tensors in flat.items():
            for begin in range(0, numels[i], limit):
                end = min(begin + limit, numels[i])
                scales = tuple(s[begin // BLOCK_SIZE:num_blocks(end)]
                               for s in (moment_scales[i] if moment_scales else ()))
                update_piece([x[begin:end] for x in tensors], scales, factors, decayed[i], scratch)
            if not parameters[i].is_contiguous():
                parameters[i].copy_(tensors[0].view(parameters[i].shape))
        for number, bundle in enumerate(bundles):
            _update_bundle([[column[i] for i in bundle] for column in columns], joined, factors,
                           decayed[bundle[0]], scratch, is_laid_out=number == 0)

    return update


def _update_bundle(
    columns: Sequence[list[Tensor]], joined: Sequence[Tensor], factors: Factors, decays: bool,
    scratch: Scratch, *, is_laid_out: bool,
) -> None:
    """The step on tensors that are laid end to end in `joined`, where the first bundle is."""
    values = [whole[:sum(x.numel() for x in columns[0])] for whole in joined]
    if not is_laid_out:
        for tensors, value in zip(columns, values, strict=True):
            torch._foreach_copy_(_parts(value, tensors), tensors)
    update_piece(values, (), factors, decays, scratch)
    for i in (0, *range(2, len(columns))):  # all but the gradients
        torch._foreach_copy_(columns[i], _parts(values[i], columns[i]))


def _parts(joined: Tensor, like: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor in the shapes of those that lie end to end in it."""
    return list(_unflatten_dense_tensors(joined, like))  # type: ignore[no-untyped-call]


def _take_memory(
    columns: Sequence[Sequence[Tensor]], numels: Sequence[int], decayed: Sequence[bool],
    is_8bit: bool,
) -> tuple[int, list[list[int]], Scratch, list[Tensor]]:
    """Elements of a piece, as many as there is memory for; bundles, the largest first; scratch;
    the columns of the first bundle end to end."""
    weight = columns[0][0]
    limit = PIECE_ELEMENTS.get(weight.device.type, LARGE_PIECE_ELEMENTS)
    while True:
        # Codes share scales, so they cannot be joined.
        bundles = [] if is_8bit else sorted(
            _bundles(numels, decayed, limit // 8, limit),
            key=lambda bundle: -sum(numels[i] for i in bundle))
        try:
            joined = [_flatten_dense_tensors(  # type: ignore[no-untyped-call]
                [column[i] for i in bundles[0]]) for column in columns] if bundles else []
            if bundles and len(bundles[0]) == 1:  # of one tensor it is a view
                joined = [x.clone() for x in joined]
            size = max([*(len(x) for x in joined), *numels])
            scratch = Scratch(min(limit, size), weight,
                              is_narrow=weight.dtype == torch.bfloat16, is_8bit=is_8bit)
            return limit, bundles, scratch, joined
        except RuntimeError as error:
            if not is_out_of_memory(error) or limit <= LEAST_PIECE_ELEMENTS:
                raise
        limit //= 2


def _bundles(
    numels: Sequence[int], decayed: Sequence[bool], small: int, limit: int
) -> Iterator[list[int]]:
    """Tensors of at most `small` elements in groups of at most `limit`, one kind in each.

    They are laid end to end, because a call per small tensor costs more than its arithmetic.
    """
    for kind in (True, False):
        bundle: list[int] = []
        room = limit
        for i, numel in enumerate(numels):
            if decayed[i] is not kind or not 0 < numel <= small:
                continue
            if numel > room:
                yield bundle
                bundle, room = [], limit
            bundle.append(i)
            room -= numel
        if bundle:
            yield bundle


def _check(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], step: Tensor,
    decayed: Sequence[bool], scale: Tensor | None, moment_scales: Scales,
) -> None:
    op = "adamw_step"
    if not parameters:
        raise ShapeError(f"{op}: expected at least one parameter, got none")
    if (dtype := parameters[0].dtype) not in (torch.float32, torch.float64, torch.bfloat16):
        raise ShapeError(f"{op}: expected float32, float64 or bfloat16 parameters, got {dtype}; "
                         "convert them")
    is_narrow, is_8bit = dtype == torch.bfloat16, bool(moment_scales)
    if is_narrow != bool(remainders):
        raise ShapeError(f"{op}: expected remainders beside bfloat16 parameters and only there, "
                         f"got {len(remainders)} for {dtype}")
    if is_8bit and dtype == torch.float64:
        raise ShapeError(f"{op}: expected float32 or bfloat16 with 8-bit moments, got {dtype}")
    wide = wide_dtype(dtype)
    columns: dict[str, tuple[Sequence[Tensor], torch.dtype]] = {
        "parameters": (parameters, dtype), "gradients": (gradients, dtype),
        "first": (first, code_dtype(True) if is_8bit else wide),
        "second": (second, code_dtype(False) if is_8bit else wide)}
    if is_narrow:
        columns["remainders"] = (remainders, torch.int16)
    shapes = [p.shape for p in parameters]
    for name, (tensors, expected) in columns.items():
        check_like(op, name, tensors, shapes, expected,
                   contiguous=name in ("first", "second", "remainders"))
    if len(decayed) != len(parameters) or len(moment_scales) not in (0, len(parameters)):
        raise ShapeError(f"{op}: expected {len(parameters)} entries of decayed and moment_scales, "
                         f"got {len(decayed)} and {len(moment_scales)}")
    for i, pair in enumerate(moment_scales):
        count = num_blocks(parameters[i].numel())
        if any(s.shape != (count,) or s.dtype != torch.float32 for s in pair):
            raise ShapeError(f"{op}: expected two moment_scales[{i}] [{count}] float32, got "
                             f"{[(list(s.shape), s.dtype) for s in pair]}")
    if step.dim() or step.dtype != torch.int64:
        raise ShapeError(f"{op}: expected step to be an int64 scalar, got {list(step.shape)} "
                         f"{step.dtype}; make it with torch.tensor(1)")
    if scale is not None and (scale.dim() or not scale.is_floating_point()):
        raise ShapeError(f"{op}: expected scale to be a floating point scalar, got "
                         f"{list(scale.shape)} {scale.dtype}")
    others = [t for tensors, _ in columns.values() for t in tensors]
    others += [s for pair in moment_scales for s in pair] + ([] if scale is None else [scale])
    if any(t.device != step.device for t in others):
        check_device(op, {"step": step, **{f"tensor {i}": t for i, t in enumerate(others)}})


@torch.no_grad()
def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    remainders: Sequence[Tensor] = (),
    *,
    step: Tensor,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    weight_decay: float = 0.0,
    decayed: Sequence[bool] | None = None,
    scale: Tensor | None = None,
    moment_scales: Scales = (),
    backend: str | None = None,
) -> None:
    """One step of AdamW on lists of tensors, in place, in one pass over their bytes.

        g = scale dL/dw        m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
        w <- w (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    A step updates with the new moments before they are stored in 8 bits.

    Args:
        parameters: K tensors of one dtype: float32, float64, or bfloat16 with remainders.
        gradients: Of the same shapes and dtype; read only.
        first, second: m and v. Contiguous, of the parameters' shapes, float32 (float64 for
            float64); with moment_scales int8 codes of m and uint8 codes of the root of v.
        remainders: int16, see `fastrl.state_formats.split_master`; empty but for bfloat16.
        step: int64 scalar, t, the number of this step from 1.
        learning_rate, betas, epsilon: As in the formula.
        weight_decay: wd, of the parameters that `decayed` marks.
        decayed: K flags; None: all.
        scale: Floating scalar on the device, multiplies the gradients; None: 1. See
            `fastrl.ops.grad_norm.clip_coefficient`.
        moment_scales: Empty, or per parameter the scales of m and of the root of v, see
            `fastrl.state_formats.encode_moment`.
        backend: See fastrl.backends.
    Raises:
        ShapeError: when shapes, dtypes, devices or numbers of tensors do not fit together.
        ConfigError: when a setting is negative.
        BackendUnavailableError: when a backend is named that cannot run.
    Cost: reads and writes 28 bytes per float32 parameter, 26 per bfloat16 one, 14 with 8-bit
        moments; torch's path makes about twelve passes over pieces that fit a CPU's cache.
    Source: Loshchilov and Hutter 2019 (arXiv 1711.05101), algorithm 2.
    Example:
        >>> weight, m, v = torch.ones(2), torch.zeros(2), torch.zeros(2)
        >>> adamw_step([weight], [torch.tensor([3.0, -1.0])], [m], [v], step=torch.tensor(1),
        ...            learning_rate=0.5, betas=(0.9, 0.95), epsilon=1e-8)
        >>> weight.tolist()
        [0.5, 1.5]
    """
    prepare_adamw_step(
        parameters, gradients, first, second, remainders, step=step, learning_rate=learning_rate,
        betas=betas, epsilon=epsilon, weight_decay=weight_decay, decayed=decayed, scale=scale,
        moment_scales=moment_scales, backend=backend)()


@torch.no_grad()
def prepare_adamw_step(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor] = (), *, step: Tensor,
    learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float = 0.0,
    decayed: Sequence[bool] | None = None, scale: Tensor | None = None,
    moment_scales: Scales = (), backend: str | None = None,
) -> Update:
    """adamw_step in two parts: all its memory is taken now, and nothing changes before the call of
    what is returned, which takes none.

    Arguments and errors are those of `adamw_step`. The tensors must not change in between.
    """
    decayed = [True] * len(parameters) if decayed is None else decayed
    _check(parameters, gradients, first, second, remainders, step, decayed, scale, moment_scales)
    check_not_negative("adamw_step", learning_rate=learning_rate, weight_decay=weight_decay)
    check_positive("adamw_step", epsilon=epsilon)
    name = choose("adamw_step", "adamw", PREFERENCE, step.device.type, parameters[0].dtype, backend)
    settings: dict[str, Any] = {
        "step": step, "learning_rate": learning_rate, "betas": betas, "epsilon": epsilon,
        "weight_decay": weight_decay, "decayed": decayed, "scale": scale,
        "moment_scales": moment_scales}
    tensors = (parameters, gradients, first, second, remainders)
    if name == "triton":
        from fastrl_kernels.triton import adamw

        return adamw.prepare_adamw_step(*tensors, **settings)
    if name == "cuda":
        from fastrl_kernels.cuda import adamw as cuda_adamw

        return cuda_adamw.prepare_adamw_step(*tensors, **settings)
    return _prepare_reference(*tensors, **settings)
