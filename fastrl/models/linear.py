"""Linear: the decoder's matrices, which exact mode may have multiplied by another kernel."""

from torch import Tensor, nn

from fastrl.ops import linear


class Linear(nn.Linear):
    """`x @ weight.T + bias`."""

    keeps_rows = False
    """True: as `fastrl.ops.linear`, by the backend that is preferred for it. Exact mode sets this
    where the library's rows depend on how many there are, and prefers triton
    (`fastrl.exactness`); outside of exact mode it changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., O] from x [..., D]."""
        if self.keeps_rows:
            return linear(x, self.weight, self.bias)
        return super().forward(x)
