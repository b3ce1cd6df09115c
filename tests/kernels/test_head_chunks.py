"""Rows of logits at a time, and that a GPU's sweep tries as many."""

import pytest
import torch
from fastrl_kernels.head_chunks import chunk_slices, largest_chunk

from fastrl.exactness.rows import Product, gpu_row_counts


def test_chunks_fit_in_whole_tiles() -> None:
    assert largest_chunk(4 * 151936) == 1024
    assert largest_chunk(4 * 10**7) == 16 and largest_chunk(2**40) == 1
    assert [part.stop - part.start for part in chunk_slices(2500, 4 * 151936)] == [896, 896, 708]
    assert chunk_slices(0, 4) == []


@pytest.mark.parametrize("vocab_size", [70, 50257, 151936, 10**7])
def test_the_sweep_tries_every_whole_tile_up_to_the_largest_chunk(vocab_size: int) -> None:
    counts = gpu_row_counts(Product(vocab_size, 64, True))
    largest = min(8192, largest_chunk(4 * vocab_size))
    assert counts[0] == largest and counts == sorted(set(counts), reverse=True)
    assert set(range(1, min(64, largest) + 1)) <= set(counts)
    for num_tokens in (1, 40, 1000, 2500, 8192):
        sizes = {part.stop - part.start for part in chunk_slices(num_tokens, 4 * vocab_size)}
        assert max(sizes) <= largest
        assert {size for size in sizes if size % 128 == 0} <= set(counts)


def test_other_matrices_go_as_far_as_their_results_fit() -> None:
    assert gpu_row_counts(Product(4096, 64))[:3] == [8192, 4096, 2048]
    assert gpu_row_counts(Product(151936, 64))[:3] == [441, 256, 128]


@pytest.mark.gpu
def test_the_sampler_multiplies_as_many_at_a_time() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from fastrl.models.heads import project_logits

    hidden = torch.randn(2500, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(151936, 64, device="cuda", dtype=torch.bfloat16)
    logits = project_logits(hidden, weight)
    assert torch.equal(logits[:896], project_logits(hidden[:896], weight))
