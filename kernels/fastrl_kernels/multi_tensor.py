"""One launch over many tensors: tables of addresses in which its blocks look up their part."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

CHUNK = 16384
"""Elements of one tensor that a block works on; a multiple of the 256 that share a scale."""


@lru_cache(maxsize=32)
def tensor_table(
    rows: tuple[tuple[int, ...], ...], numels: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """What a kernel needs to find its part; built again only when an address or a size changes.

    Args:
        rows: What describes each of K tensors: addresses and flags.
        numels: Elements of each.
        device: Where the kernel runs.
    Returns:
        table: [K, columns + 1] int64, the rows and, last, the number of elements.
        chunks: [n, 2] int32, (tensor, number of the chunk in it) of every block.
    """
    counts = torch.tensor([-(-n // CHUNK) for n in numels], device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(numels), device="cpu"), counts)
    numbers = torch.arange(len(owners), device="cpu") - (counts.cumsum(0) - counts)[owners]
    table = torch.tensor([[*row, n] for row, n in zip(rows, numels, strict=True)],
                         dtype=torch.int64, device="cpu")
    chunks = torch.stack([owners, numbers], dim=1).to(torch.int32)
    return table.to(device, non_blocking=True), chunks.to(device, non_blocking=True)


def by_alignment(
    rows: tuple[tuple[int, ...], ...], numels: tuple[int, ...], num_addresses: int
) -> list[tuple[bool, tuple[tuple[int, ...], ...], tuple[int, ...]]]:
    """Split tensors into those that are read 16 bytes at a time, and the others.

    Returns:
        For each kind that there is: True where addresses and sizes are multiples of 16, and the
        rows and sizes of its tensors.
    """
    fits = [numel % 16 == 0 and all(address % 16 == 0 for address in row[:num_addresses])
            for row, numel in zip(rows, numels, strict=True)]
    return [(kind, tuple(row for row, f in zip(rows, fits, strict=True) if f is kind),
             tuple(n for n, f in zip(numels, fits, strict=True) if f is kind))
            for kind in (True, False) if kind in fits]


def adamw_rows(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor], scales: Sequence[Tensor],
    decayed: Sequence[bool],
) -> tuple[tuple[int, ...], ...]:
    """Addresses of weight, gradient, m, v, remainder, scales of m and v (0: none); decayed."""
    return tuple(
        (p.data_ptr(), gradients[i].data_ptr(), first[i].data_ptr(), second[i].data_ptr(),
         remainders[i].data_ptr() if remainders else 0,
         scales[2 * i].data_ptr() if scales else 0,
         scales[2 * i + 1].data_ptr() if scales else 0, int(decayed[i]))
        for i, p in enumerate(parameters))


def adamw_factors(
    step: Tensor, learning_rate: float, betas: tuple[float, float], epsilon: float,
    scale: Tensor | None,
) -> Tensor:
    """step_size, epsilon and scale of a step, [3] float32 on its device.

        root = sqrt(1 - b2^t)    step_size = lr root / (1 - b1^t)    epsilon root    scale
    """
    root = (1 - betas[1] ** step.double()).sqrt()
    step_size = learning_rate * root / (1 - betas[0] ** step.double())
    scale = torch.ones_like(root) if scale is None else scale.double()
    return torch.stack([step_size, epsilon * root, scale]).float()


@torch.no_grad()
def prepare_adamw(
    prepare: Callable[..., Callable[[], None]], launch: Callable[..., None],
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], first: Sequence[Tensor],
    second: Sequence[Tensor], remainders: Sequence[Tensor] = (), *, step: Tensor,
    learning_rate: float, betas: tuple[float, float], epsilon: float, weight_decay: float = 0.0,
    decayed: Sequence[bool] | None = None, scale: Tensor | None = None,
    moment_scales: Sequence[tuple[Tensor, Tensor]] = (),
) -> Callable[[], None]:
    """fastrl.ops.adamw.prepare_adamw_step by a backend's kernel.

    Args:
        prepare: Takes all memory for a launch over contiguous tensors; what it returns launches.
        launch: Both at once, as an op that a compiled graph holds.
        Others: As there.
    """
    weights = [p.contiguous() for p in parameters]
    arguments = (
        weights, [g.contiguous() for g in gradients], first, second, remainders,
        [s for pair in moment_scales for s in pair],
        adamw_factors(step, learning_rate, betas, epsilon, scale), *betas,
        1 - learning_rate * weight_decay,
        [True] * len(weights) if decayed is None else decayed)
    is_compiling = torch.compiler.is_compiling()
    run = partial(launch, *arguments) if is_compiling else prepare(*arguments)

    def update(kept: object = arguments) -> None:  # a table only has addresses
        run()
        if not is_compiling:  # autograd refuses whoever still needs the old weights
            torch.autograd.graph.increment_version(parameters)
        for parameter, weight in zip(parameters, weights, strict=True):
            if not parameter.is_contiguous():
                parameter.copy_(weight)

    return update
