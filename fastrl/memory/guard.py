"""Parked tensors have a shape and no content: who reads one gets an error, not a crash.

PyTorch reads an empty storage without a look at its size, which ends the process. While a tensor is
parked it is of a class that lets shapes, types and gradients through and refuses all else; that
reaches whatever gets the tensor as an argument, but no view that was made of it before.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from fastrl.errors import ConfigError

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "requires_grad",
               "grad", "is_leaf", "is_cuda", "is_meta", "is_sparse", "is_quantized")
_METHODS = ("size", "dim", "numel", "stride", "element_size", "storage_offset", "untyped_storage",
            "is_floating_point", "is_complex", "requires_grad_")
WITHOUT_CONTENT = frozenset({
    Tensor.grad.__set__,  # type: ignore[union-attr]
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(getattr(Tensor, name) for name in _METHODS), torch.empty_like, torch.zeros_like})
"""Calls that read and write no element of a tensor."""


class Guard:
    """Refuses every use of the content of a group of tensors.

    Args:
        group: Name of the group.
        phases: Those that need it.
    """

    def __init__(self, group: str, phases: Iterable[str] = ()) -> None:
        names = tuple(phases) or ("its phase",)
        self._parked_from = f"parked ones ({group}, which {', '.join(names)} bring back)"
        self._message = (
            f"{group}: expected it in memory, got it parked on the host outside of "
            f"{', '.join(names)}; use it inside `with trainer.residents.phase({names[0]!r}):`, "
            "bring everything back with trainer.residents.fetch_all(), or set parking to off")
        self._classes: dict[type[Tensor], type[Tensor]] = {}
        self._guarded: list[tuple[Tensor, type[Tensor]]] = []

    def close(self, tensors: Iterable[Tensor]) -> None:
        """From now on only shapes, types and gradients of the tensors can be read."""
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            if tensor.numel():
                self._guarded.append((tensor, type(tensor)))
                tensor.__class__ = self._guard_of(type(tensor))

    def open(self) -> None:
        """The tensors are what they were."""
        for tensor, kind in self._guarded:
            tensor.__class__ = kind
        self._guarded = []

    def _guard_of(self, kind: type[Tensor]) -> type[Tensor]:
        """The class that stands in for a tensor's own."""
        if kind not in self._classes:
            def refuse(
                cls: type[Tensor], function: Callable[..., Any], types: Iterable[type],
                args: Iterable[Any] = (), kwargs: Mapping[str, Any] | None = None,
            ) -> Any:
                if function not in WITHOUT_CONTENT:
                    raise ConfigError(self._message)
                with torch._C.DisableTorchFunctionSubclass():
                    return function(*args, **(kwargs or {}))

            self._classes[kind] = cast("type[Tensor]", type(
                f"Parked{kind.__name__}", (kind,),
                {"__torch_function__": classmethod(refuse), "parked_from": self._parked_from}))
        return self._classes[kind]
