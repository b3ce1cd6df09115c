"""The Triton kernels that write pages, against the references; run by test_triton.py."""

import pytest
import torch
import triton
import triton.language as tl
from fastrl_kernels.triton import kv_cache as kernels
from torch import Tensor

from fastrl.errors import BackendUnavailableError
from fastrl.ops import copy_pages, qk_norm_rotary, rotary, rotary_write_kv, write_kv
from fastrl.ops.kv_cache import (
    copy_pages_reference,
    rotary_write_kv_reference,
    write_kv_reference,
)

EPSILON = 1e-3
SLOTS = [9, -1, 0, 7, -1, 23]
FLOORS = {torch.float32: 1e-6, torch.float16: 2**-11,
          # The interpreter cuts a float32 to bfloat16 where a GPU rounds: twice the error, thrice.
          torch.bfloat16: 3 * 2**-8}
KINDS = {"rotary": (True, False), "norms": (False, True), "both": (True, True),
         "neither": (False, False)}


def new_pages(Hk: int, C: int, page_size: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(24 // page_size, 3, 2, page_size, Hk, C).to(dtype)


def heads_and_options(
    kind: str, Hq: int = 4, Hk: int = 2, C: int = 16, R: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Merged projections of six tokens, and what happens to queries and keys."""
    turns, has_norms = KINDS[kind]
    heads, angles = torch.randn(6, Hq + 2 * Hk, C).to(dtype), 6 * torch.rand(6, 1, R // 2)
    options = {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)} if turns else {}
    if has_norms:
        options |= dict(zip(("q_weight", "k_weight"), torch.randn(2, C).to(dtype), strict=True))
    return heads, options


def assert_as_good_as_torch(
    heads: Tensor, options: dict[str, Tensor], pages: Tensor, slots: Tensor | None = None
) -> None:
    """Queries and every element of the pages, also those that stay."""
    slots = torch.tensor(SLOTS) if slots is None else slots
    results = []
    for function, wide in ((rotary_write_kv, False), (rotary_write_kv_reference, False),
                           (rotary_write_kv_reference, True)):
        dtype = torch.float64 if wide else heads.dtype
        written = pages.to(dtype, copy=True)
        more = {"backend": "triton"} if function is rotary_write_kv else {}
        query = function(heads.to(dtype), written, 1, slots,
                         **{k: x.to(dtype) for k, x in options.items()}, epsilon=EPSILON, **more)
        results.append((query, written))
    for ours, plain, truth in zip(*results, strict=True):
        assert ours.dtype == plain.dtype and ours.shape == truth.shape
        error, torch_error = ((x - truth).abs().max() for x in (ours, plain))
        assert error <= 2 * torch_error + FLOORS[heads.dtype] * truth.abs().max()
    untouched = torch.ones_like(pages, dtype=torch.bool)
    for slot in slots[slots >= 0].tolist():
        untouched[slot // pages.shape[3], 1, :, slot % pages.shape[3]] = False
    assert torch.equal(results[0][1][untouched], pages[untouched])


# One pair; more heads than a tile; no power of two; as in GPT-NeoX; Qwen3's heads.
@pytest.mark.parametrize("Hq, Hk, C, R", [(1, 1, 2, 2), (20, 18, 64, 64), (3, 1, 24, 24),
                                          (2, 2, 80, 20), (2, 1, 7, 4), (4, 2, 128, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes(kind: str, Hq: int, Hk: int, C: int, R: int) -> None:
    assert_as_good_as_torch(*heads_and_options(kind, Hq, Hk, C, R), new_pages(Hk, C))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_narrow_types(kind: str, dtype: torch.dtype) -> None:
    heads, options = heads_and_options(kind, R=6, dtype=dtype)
    assert_as_good_as_torch(heads, options, new_pages(2, 16, dtype=dtype))


@pytest.mark.parametrize("page_size", [1, 3, 24])
def test_page_sizes(page_size: int) -> None:
    assert_as_good_as_torch(*heads_and_options("both"), new_pages(2, 16, page_size))


def test_not_contiguous() -> None:
    heads, options = heads_and_options("both")
    spread = {k: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
              for k, x in options.items()}
    slots = torch.tensor([SLOTS, SLOTS]).t().contiguous()[:, 0]
    assert not slots.is_contiguous()
    wide = torch.randn(6, 3, 8, 16)[:, 1]  # tokens and heads apart
    assert_as_good_as_torch(wide, spread, new_pages(2, 16), slots)
    assert_as_good_as_torch(heads.transpose(1, 2).contiguous().transpose(1, 2), options,
                            new_pages(2, 16))


@pytest.mark.parametrize("kind", ["rotary", "both"])
def test_the_trainer_gets_the_same_bits(kind: str) -> None:
    """A token alone or among others, in training or on pages: this is what makes ratios 1."""
    heads, options = heads_and_options(kind, dtype=torch.float16, C=24, R=16)
    pages = torch.zeros(6, 3, 2, 4, 2, 24, dtype=torch.float16)
    query, key, value = heads.split([4, 2, 2], dim=1)
    angles = options["cos"], options["sin"]
    if kind == "both":
        expected = qk_norm_rotary(query, key, options["q_weight"], options["k_weight"], *angles,
                                  epsilon=EPSILON, backend="triton")
    else:
        expected = rotary(query, key, *angles, backend="triton")
    slots = torch.arange(6) * 3
    got = rotary_write_kv(heads, pages, 2, slots, **options, epsilon=EPSILON, backend="triton")
    rows = pages[:, 2].transpose(1, 2).flatten(0, 1)[slots]
    for ours, trainers in zip((got, *rows.unbind(1)), (*expected, value), strict=True):
        assert torch.equal(ours, trainers)
    alone = rotary_write_kv(heads[3:4], pages, 0, slots[:1], epsilon=EPSILON, backend="triton",
                            **{k: x[3:4] if x.dim() == 3 else x for k, x in options.items()})
    assert torch.equal(alone[0], got[3]) and torch.equal(pages[0, 0, :, 0], rows[3])


def test_write_kv() -> None:
    for dtype in FLOORS:
        merged = torch.randn(6, 9, 5).to(dtype)
        other = torch.randn(3, 6, 7).to(dtype).transpose(0, 1)[..., 1:6]  # strides of its own
        for key, value in ((merged[:, 3:6], merged[:, 6:]), (merged[:, 3:6], other),
                           (other, merged[:, 6:])):
            pages = new_pages(3, 5, dtype=dtype)
            expected = pages.clone()
            write_kv(key, value, pages, 2, torch.tensor(SLOTS), backend="triton")
            write_kv_reference(key, value, expected, 2, torch.tensor(SLOTS))
            assert torch.equal(pages, expected)


def test_nothing_happens_to_queries_without_norms_and_rotation() -> None:
    heads, _ = heads_and_options("neither")
    query = rotary_write_kv(heads, new_pages(2, 16), 0, torch.tensor(SLOTS), backend="triton")
    assert query.data_ptr() == heads.data_ptr() and torch.equal(query, heads[:, :4])


@pytest.mark.parametrize("C", [5, 400])  # a page in one block; in several, the last not full
def test_copy_pages(C: int) -> None:
    pages = torch.randn(7, 3, 2, 4, 3, C)
    assert C == 5 or pages[0].numel() > kernels.PAGE_BLOCK
    pages[5, 0, 0, 0, 0, 0] = torch.nan
    expected = pages.clone()
    sources, targets = torch.tensor([[5, 2, 5], [0, 6, 3]])
    copy_pages(pages, sources, targets, backend="triton")
    copy_pages_reference(expected, sources, targets)
    assert torch.equal(pages.view(torch.int32), expected.view(torch.int32))
    copy_pages(pages, sources[:0], targets[:0], backend="triton")
    assert torch.equal(pages.view(torch.int32), expected.view(torch.int32))


def test_no_tokens_and_no_slots() -> None:
    heads, options = heads_and_options("both")
    assert_as_good_as_torch(heads, options, new_pages(2, 16), torch.full((6,), -1))
    pages = new_pages(2, 16)
    write_kv(heads[:0, :2], heads[:0, 2:4], pages, 0, torch.tensor(SLOTS)[:0], backend="triton")
    nothing = {k: x[:0] if x.dim() == 3 else x for k, x in options.items()}
    query = rotary_write_kv(heads[:0], pages, 0, torch.tensor(SLOTS)[:0], **nothing,
                            backend="triton")
    assert query.shape == (0, 4, 16)


def test_slots_and_pages_outside_the_arena_write_nothing() -> None:
    arena = new_pages(2, 16)
    inside, before = arena[1:3], arena.clone()
    heads, options = heads_and_options("both")
    num_slots = inside.shape[0] * inside.shape[3]
    slots = torch.tensor([num_slots, -1, -2, num_slots + 5, num_slots, num_slots])
    rotary_write_kv(heads, inside, 0, slots, **options, epsilon=1e-6, backend="triton")
    write_kv(heads[:, :2], heads[:, 2:4], inside, 0, slots, backend="triton")
    copy_pages(inside, torch.tensor([0, 2, -1, 0]), torch.tensor([2, 0, 1, -1]), backend="triton")
    assert torch.equal(arena.view(torch.int32), before.view(torch.int32))
    write_kv(heads[:0, :2], heads[:0, 2:4], arena[:0], 0, slots[:0], backend="triton")


def test_offsets_are_wide() -> None:
    """The last slot of an arena of 2^33 slots, which is too large to be allocated here."""
    @triton.jit
    def kernel(slot_ptr, out_ptr):
        place = kernels.kv_place(tl.load(slot_ptr), 35, 1, 36, 16, 8, 7, 128)
        tl.store(out_ptr, place)

    slot, out = torch.tensor([2**33 - 1]), torch.zeros(1, dtype=torch.int64)
    kernel[(1,)](slot, out)
    assert out.item() == ((2**29 * 36 * 2 * 16 - 1) * 8 + 7) * 128 > 2**48


@pytest.mark.parametrize("kind", ["rotary", "both"])
def test_registered_ops(kind: str) -> None:
    heads, options = heads_and_options(kind)
    pages, slots = new_pages(2, 16), torch.tensor(SLOTS)
    ops = torch.ops.fastrl_kernels
    names = ("cos", "sin", "q_weight", "k_weight")
    torch.library.opcheck(ops.rotary_write_kv, (
        heads, pages, 1, slots, *(options.get(name) for name in names), EPSILON))
    if kind == "both":
        torch.library.opcheck(ops.write_kv, (heads[:, 4:6].contiguous(),
                                             heads[:, 6:].contiguous(), pages, 1, slots))
        torch.library.opcheck(ops.copy_pages, (pages, torch.tensor([1]), torch.tensor([2])))


def test_compiles_to_one_graph() -> None:
    torch.compiler.reset()
    heads, options = heads_and_options("both")
    slots, results = torch.tensor(SLOTS), []

    def step(heads: Tensor, pages: Tensor, **options: Tensor) -> Tensor:
        query = rotary_write_kv(heads, pages, 1, slots, **options, epsilon=EPSILON,
                                backend="triton")
        write_kv(heads[:, 4:6], heads[:, 6:], pages, 0, slots, backend="triton")
        copy_pages(pages, slots[:1], slots[2:3], backend="triton")
        return query

    first = torch.randn(12, 3, 2, 4, 2, 16)
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        pages = first.clone()
        results.append((function(heads, pages, **options), pages))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_float64_is_refused() -> None:
    heads, _ = heads_and_options("neither")
    with pytest.raises(BackendUnavailableError, match="it computes in float32"):
        rotary_write_kv(heads.double(), new_pages(2, 16).double(), 0, torch.tensor(SLOTS),
                        backend="triton")
