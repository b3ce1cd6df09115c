"""The decoder with every op in Triton against torch, both passes; run by test_triton.py."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastrl.backends import use_backend
from fastrl.models import CausalLM, PackedAttention, PagedAttention, decoder_config, new_decoder
from fastrl.models.attention import Projections
from fastrl.packing import pack_sequences

FLOOR = 1e-6  # float32 sums in another order
SEQUENCES = ((5, 7, 46, 9, 33), (4,), (17, 18, 19))


def tiny(family: str) -> CausalLM:
    """Two layers, 4 query and, where the family has them, 2 KV heads of 8 channels."""
    shared = {} if family in ("gpt2", "gpt_neox") else {"num_kv_heads": 2}
    config = decoder_config(family, vocab_size=47, hidden_size=32, num_layers=2, num_heads=4,
                            max_positions=32, **shared)
    return new_decoder(replace(config, initializer_range=0.3), seed=1,
                       device=torch.get_default_device())


def forward_and_backward(model: CausalLM) -> list[Tensor]:
    """Hidden states, and the gradient of every weight."""
    batch = pack_sequences(SEQUENCES, torch.get_default_device())
    hidden = model(batch.token_ids, batch.positions,
                   PackedAttention(batch.cu_seqlens, batch.max_seqlen))
    return [hidden, *torch.autograd.grad(hidden.sin().sum(), model.backbone.parameters())]


def assert_as_good(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor]) -> None:
    for got, torchs, exact in zip(ours, plain, truth, strict=True):
        error, torch_error = ((x - exact).abs().max() for x in (got, torchs))
        assert error <= 2 * torch_error + FLOOR * exact.abs().max()


# Norms of rows and of heads, gates, all and some channels turning, learned positions, blocks side
# by side.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_as_good_as_torch(family: str) -> None:
    model = tiny(family)
    with use_backend("triton"):
        ours = forward_and_backward(model)
    assert_as_good(ours, forward_and_backward(model),
                   forward_and_backward(copy.deepcopy(model).double()))


@torch.no_grad()
def prefill_and_decode(model: CausalLM) -> list[Tensor]:
    """Hidden states of two prompts of 5 and 3 tokens, and of one token more of each; the pages."""
    spec = model.spec
    pages = torch.zeros(4, spec.num_layers, 2, 4, spec.num_kv_heads, spec.head_dim,
                        dtype=model.lm_head.weight.dtype)
    table, ids = torch.tensor([[3, 0], [1, 2]]), torch.tensor([5, 7, 46, 9, 33, 17, 18, 19, 2, 3])
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 5, 3])
    slots = torch.tensor([12, 13, 14, 15, 0, 4, 5, 6, 1, 7])
    first = PagedAttention(pages, table, slots[:8], torch.tensor([0, 5, 8]), torch.tensor([5, 3]),
                           5, 5)
    second = PagedAttention(pages, table, slots[8:], torch.arange(3), torch.tensor([6, 4]), 1, 6)
    return [model(ids[:8], positions[:8], first), model(ids[8:], positions[8:], second), pages]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_pages_are_as_good_as_torch(family: str) -> None:
    model = tiny(family)
    with use_backend("triton"):
        ours = prefill_and_decode(model)
    assert_as_good(ours, prefill_and_decode(model),
                   prefill_and_decode(copy.deepcopy(model).double()))


class Ops(TorchDispatchMode):
    """The ops of torch that were run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "mm":
            self.products.append(tuple(args[1].shape))
        return func(*args, **(kwargs or {}))


def test_a_layer_of_a_decode_step_is_five_kernels_and_four_products(launches: list[str]) -> None:
    """Nothing is added, turned, scaled or put together by a launch of its own."""
    model = tiny("qwen3")
    spec, inner = model.spec, model.backbone.config.intermediate_size
    pages = torch.zeros(2, spec.num_layers, 2, 4, spec.num_kv_heads, spec.head_dim)
    step = PagedAttention(pages, torch.tensor([[0, 1]]), torch.tensor([5]), torch.arange(2),
                          torch.tensor([6]), 1, 6)
    with use_backend("triton"), torch.no_grad(), Ops() as ops:
        model(torch.tensor([4]), torch.tensor([5]), step)
    layer = ["_norm_fwd_kernel", "_write_kv_kernel", "_paged_attention_fwd_kernel",
             "_norm_fwd_kernel", "_swiglu_fwd_kernel"]
    assert launches == [*layer, *layer, "_norm_fwd_kernel"]
    channels = spec.head_dim
    assert ops.products == 2 * [
        (32, 8 * channels), (4 * channels, 32), (32, 2 * inner), (inner, 32)]
    arithmetic = {"add", "cat", "div", "index_put_", "mean", "mul", "neg", "pow", "rsqrt",
                  "sigmoid", "silu", "sub"}
    assert [name for name in ops.names if name in arithmetic] == ["mul"]  # the angles of the step


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_packed_and_paged_see_the_same_queries_keys_and_values(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, before attention: what the trainer turns is what the engine turns."""
    heads, angles = torch.randn(6, 8, 8), torch.rand(6, 1, 4)
    weights = tuple(torch.randn(2, 8)) if family == "qwen3" else None
    projections = Projections(2, (angles.cos(), angles.sin()), weights, 1e-5)
    seen: list[Tensor] = []

    def remember(state: object, layer: int, query: Tensor, *others: Tensor, **_: object) -> Tensor:
        seen.extend((query, *others[:2]))
        return query

    pages = torch.zeros(2, 1, 2, 4, 2, 8)
    paged = PagedAttention(pages, torch.tensor([[0, 1]]), torch.arange(6), torch.tensor([0, 6]),
                           torch.tensor([6]), 6, 6)
    monkeypatch.setattr(PackedAttention, "__call__", remember)
    monkeypatch.setattr(PagedAttention, "_attend", lambda state, layer, query, *_: query)
    with use_backend("triton"):
        PackedAttention(torch.tensor([0, 6]), 6).from_projections(0, heads, projections, scale=1.0)
        query = paged.from_projections(0, heads, projections, scale=1.0)
    rows = pages[:, 0].transpose(1, 2).flatten(0, 1)[:6]
    for trainers, engines in zip(seen, (query, *rows.unbind(1)), strict=True):
        assert torch.equal(trainers, engines)
