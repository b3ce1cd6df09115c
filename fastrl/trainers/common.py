"""What the trainers share: packed forwards, microbatches, data order, devices and guards."""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastrl.checks import check_resident
from fastrl.config import TrainConfig
from fastrl.errors import ConfigError, DataError, NumericsError
from fastrl.models.attention import PackedAttention
from fastrl.models.causal_lm import CausalLM, ScalarModel
from fastrl.ops import linear_cross_entropy
from fastrl.out_of_memory import PassBudget, call_again
from fastrl.packing import PackedBatch, pack_sequences, predict_rows, split_by_tokens
from fastrl.types import TokenExample


class Progress(Protocol):
    """What a trainer tells a console: the number of finished steps and that step's metrics."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called once after every step; `step` counts finished steps from 1."""


class SilentProgress:
    """Shows nothing."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to do."""


def resolve_device(name: str) -> torch.device:
    """The device that a config names; auto takes a GPU when there is one.

    Raises:
        ConfigError: when the name is unknown, or a GPU is named that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}; "
                          "change device")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: expected one of {torch.cuda.device_count()} CUDA devices, got "
                          f"{name!r}; use device='cpu' or 'auto'")
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a config names; auto is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if name not in dtypes:
        raise ConfigError(f"dtype: expected auto or one of {sorted(dtypes)}, got {name!r}; "
                          "change dtype")
    return dtypes[name]


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose of a run; different names give unrelated seeds."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside the block torch's generators start from `seed`; afterwards they are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def mode(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Inside the block the model is in train or eval mode; afterwards in the mode it had."""
    before = model.training
    model.train(train)
    try:
        yield
    finally:
        model.train(before)


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Cached, because every step of an epoch asks for it."""
    def draw() -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        return tuple(torch.randperm(size, generator=generator).tolist())

    return call_again(draw, f"order of {size} rows")


def epoch_permutation(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `size` rows: a function of seed and epoch alone."""
    return list(_permutation(size, seed, epoch))


def epoch_batches(size: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, every row once; the last batch may be smaller."""
    order = epoch_permutation(size, seed, epoch)
    return [order[i:i + batch_size] for i in range(0, size, batch_size)]


def stream_indices(size: int, seed: int, begin: int, count: int) -> list[int]:
    """Entries `begin` to `begin + count` of the endless sequence of epoch permutations."""
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(begin + len(indices), size)
        indices += epoch_permutation(size, seed, epoch)[offset:offset + count - len(indices)]
    return indices


def require_rows(rows: Sequence[object], what: str) -> None:
    """Raise DataError when there is nothing to train on."""
    if not rows:
        raise DataError(f"{what}: expected at least one row, got none; check the data file and "
                        "the length limits")


def packed_forward(
    model: CausalLM | ScalarModel, sequences: Sequence[Sequence[int]],
    prompt_lens: Sequence[int] | None = None, *, share_prefix: bool = False,
) -> tuple[Tensor, PackedBatch]:
    """Run a model over token lists laid end to end; no padding, attention inside each list only.

    Args:
        sequences: B token lists, none empty.
        prompt_lens, share_prefix: See `pack_sequences`.
    Returns:
        The model's output ([N, D] of a CausalLM, [N] of a ScalarModel) and the batch it read.
    """
    weight = next(model.parameters())
    check_resident(type(model).__name__, weight)
    batch = pack_sequences(sequences, weight.device, prompt_lens=prompt_lens,
                           share_prefix=share_prefix)
    return model(batch.token_ids, batch.positions, PackedAttention.of(batch)), batch


def prepare_backbone(model: CausalLM | ScalarModel, config: TrainConfig) -> None:
    """Give a model that is trained the settings of its passes with gradient.

    Raises:
        ModelError: when the model cannot run its layers again (`activation_checkpointing`).
    """
    backbone: Any = model.backbone
    backbone.activation_checkpointing = config.activation_checkpointing


def accumulate(
    lengths: Sequence[int], max_tokens: int, loss_of: Callable[[list[int]], Tensor],
    weight: float = 1.0, prompts: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Backward through a minibatch in microbatches of at most `max_tokens` tokens.

    Args:
        lengths: Tokens of each row of the minibatch.
        max_tokens: Token budget of a microbatch; a longer row gets one of its own.
        loss_of: Given row numbers, that share of the minibatch's loss: already divided by the
            count of the *whole* minibatch, so that shares add up.
        weight: Multiplies the gradient, not the loss returned.
        prompts: Prompt of each row, where a microbatch holds equal ones once: see
            `split_by_tokens`.
    Returns:
        The loss of the minibatch, scalar, no gradient; `.grad` of the weights has been added to.
    """
    shares = []
    for rows in split_by_tokens(lengths, max_tokens, prompts):
        loss = loss_of(rows)
        (weight * loss).backward()  # type: ignore[no-untyped-call]
        shares.append(loss.detach())
    return torch.stack(shares).sum()


def check_example(example: TokenExample, index: int) -> None:
    """Raise DataError when a mask does not fit its tokens, or marks the first token."""
    if len(example.loss_mask) != len(example.token_ids) or not example.token_ids:
        raise DataError(f"example {index}: expected one loss_mask flag for each of at least one "
                        f"token, got {len(example.loss_mask)} flags for {len(example.token_ids)} "
                        "tokens; rebuild the example")
    if example.loss_mask[0]:
        raise DataError(f"example {index}: expected loss_mask[0] to be False, got True; nothing "
                        "predicts the first token: put a beginning-of-text token before it")


def num_targets(examples: Sequence[TokenExample]) -> int:
    """Tokens of the examples that count in the loss."""
    return sum(sum(e.loss_mask) for e in examples)


def token_loss(model: CausalLM, examples: Sequence[TokenExample], denominator: int) -> Tensor:
    """Negative log-likelihood of the targets of `examples`, divided by `denominator`.

        loss = -1/denominator * sum over targets of log p(token | tokens before it)

    Args:
        denominator: `num_targets` of the whole minibatch.
    Returns:
        Scalar, float32 or wider.
    """
    hidden, batch = packed_forward(model, [e.token_ids for e in examples])
    mask = torch.tensor([flag for e in examples for flag in e.loss_mask], device=hidden.device)
    rows, targets = predict_rows(mask, batch)
    loss: Tensor = model.lm_head(hidden[rows], linear_cross_entropy, batch.token_ids[targets],
                                 denominator=denominator)
    return loss


def backward_token_loss(
    model: CausalLM, examples: Sequence[TokenExample], max_tokens: int, weight: float = 1.0
) -> float:
    """Add the gradient of `weight` times the token-mean loss of a minibatch; return the loss.

    Used for demonstrations and for the pretraining term of SFT and PPO-ptx.
    """
    count = num_targets(examples)
    if count == 0:
        raise DataError(f"token loss: expected target tokens, got none in {len(examples)} "
                        "examples; drop examples with an empty loss_mask")
    return float(accumulate(
        [len(e.token_ids) for e in examples], max_tokens,
        lambda rows: token_loss(model, [examples[i] for i in rows], count), weight))


@torch.no_grad()
def evaluate_token_loss(
    model: CausalLM, examples: Sequence[TokenExample], max_tokens: int | PassBudget
) -> float:
    """Token-mean loss of held-out examples, in eval mode; nats per token."""
    count, lengths = num_targets(examples), [len(e.token_ids) for e in examples]

    def attempt(max_tokens: int) -> float:
        return math.fsum(float(token_loss(model, [examples[i] for i in rows], count))
                         for rows in split_by_tokens(lengths, max_tokens))

    with mode(model, train=False):
        return PassBudget.of(max_tokens).run(attempt, lengths, "held-out loss")


def check_finite(step: int, metrics: Mapping[str, float]) -> None:
    """Stop at the first NaN or infinity, before it reaches the weights.

    Raises:
        NumericsError: names the step and the metric.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise NumericsError(
                f"step {step}: expected a finite {name}, got {value}; weights are those of the "
                "step before. Lower learning_rate, set max_grad_norm, or check the data"
            )
