"""The decode batch: one row of every tensor per running sequence, and dummy rows after them.

Shape letters: R rows (running sequences, then dummies), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """State of the running sequences, on the model's device. Tensors change in place each step.

    A dummy row has `alive` 0, no cached tokens, and writes to the last row of the results.
    """

    size: int
    """Real rows; dummies follow."""
    index: Tensor
    """[R] int64, row of the results."""
    alive: Tensor
    """[R] int64, 1 for real rows."""
    seeds: Tensor
    """[R] int64, keys of the random numbers."""
    token_ids: Tensor
    """[R] int64, the newest token, not in the cache yet."""
    kv_lens: Tensor
    """[R] int64, tokens in the cache."""
    num_generated: Tensor
    """[R] int64, response tokens, the newest included."""
    max_tokens: Tensor
    """[R] int64, longest response."""
    num_recorded: Tensor
    """[R] int64, tokens that are replayed, not drawn."""
    page_table: Tensor
    """[R, pages] int64."""
    seen: Tensor
    """[R, V] bool, tokens of prompt and response; [R, 0] where no penalty needs it."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "size"}

    def select(self, rows: Sequence[int]) -> "DecodeBatch":
        """The real rows `rows`, in that order, without dummies."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.index.device)
        return DecodeBatch(len(rows), **{
            name: tensor.index_select(0, index) for name, tensor in self.tensors().items()})

    def join(self, other: "DecodeBatch") -> "DecodeBatch":
        """The real rows of both, without dummies."""
        more = other.tensors()
        return DecodeBatch(self.size + other.size, **{
            name: torch.cat([tensor[: self.size], more[name][: other.size]])
            for name, tensor in self.tensors().items()})

    def pad(self, num_rows: int, trash: int) -> "DecodeBatch":
        """`num_rows` rows: dummies follow, and their results go to row `trash`."""
        padded = {name: pad_rows(tensor, num_rows) for name, tensor in self.tensors().items()}
        padded["index"][self.size :] = trash
        return DecodeBatch(self.size, **padded)


def pad_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """`tensor` with rows of zeros up to `num_rows`."""
    missing = num_rows - tensor.shape[0]
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, missing)) if missing else tensor
