"""What the device knows of each row, on its way to the host."""

from collections.abc import Iterator, Sequence

import torch

from fastrl.engine.batch import DecodeBatch
from fastrl.engine.request import Request


class Flags:
    """A copy of the rows' flags as they are when the device gets here.

    On a GPU it goes to pinned memory behind the steps that are queued, and an event says when it
    is there: whoever reads it a round later does not wait. 32 bytes per row take the stream less
    time than the events that another stream would need.

    Args:
        batch: The batch, its real rows first.
        requests: One for each of them.
    """

    def __init__(self, batch: DecodeBatch, requests: Sequence[Request]) -> None:
        self._requests = tuple(requests)
        size = batch.size
        packed = torch.cat([batch.alive[:size], batch.stopped[:size], batch.num_generated[:size],
                            batch.token_ids[:size]])
        self._copy, self._event = packed, None
        if packed.is_cuda:
            self._copy = torch.empty_like(packed, device="cpu", pin_memory=True)
            self._copy.copy_(packed, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> Iterator[tuple[Request, bool, bool, int, int]]:
        """By row: request, whether it is alive, whether a stop token ended it, number of its
        tokens, and the newest token where it is alive or has ended in this step.
        """
        if self._event is not None:
            self._event.synchronize()
        values, size = self._copy.tolist(), len(self._requests)
        columns = (values[i * size : (i + 1) * size] for i in range(4))
        for request, alive, stopped, count, token_id in zip(self._requests, *columns, strict=True):
            yield request, bool(alive), bool(stopped), count, token_id
