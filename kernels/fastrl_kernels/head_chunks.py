"""How many rows of logits are made at a time on a GPU: by the sampler, by scoring and by losses.

A library picks its kernel by the number of rows: where no product has more of them than this, the
start-up sweep of exact mode can try them all.
"""

CHUNK_BYTES = 640 * 2**20
"""Logits in memory at a time: 1024 rows of float32 at a vocabulary of 151936."""
TILE = 128
"""Rows of a product's tile; chunks are multiples of it, so that no tile is mostly empty."""


def largest_chunk(row_bytes: int) -> int:
    """Rows of the largest chunk."""
    largest = max(1, CHUNK_BYTES // row_bytes)
    return largest - largest % TILE if largest >= TILE else largest


def chunk_slices(num_tokens: int, row_bytes: int, chunk_tokens: int | None = None) -> list[slice]:
    """Token ranges of nearly equal size, of `chunk_tokens` or as many as fit CHUNK_BYTES."""
    largest = chunk_tokens or largest_chunk(row_bytes)
    num_chunks = max(1, -(-num_tokens // largest))
    size = max(1, -(-num_tokens // num_chunks))
    size = min(largest, -(-size // TILE) * TILE)
    return [slice(i, min(i + size, num_tokens)) for i in range(0, num_tokens, size)]
