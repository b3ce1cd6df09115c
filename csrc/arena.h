// Address ranges of a GPU, reserved once, into which memory is mapped and from which it is taken.
// Sizes are multiples of the granularity. Failures throw with the driver's call, its size and what
// to do; a call that throws leaves the range as it was.
#pragma once

#include <cstdint>

namespace fastrl {

// Memory of a range is made in pieces of this size, the last one smaller: n pieces take 3n + 1
// calls of the driver to map and n to unmap.
constexpr int64_t ARENA_PIECE = int64_t{1} << 30;

// What sizes are multiples of; 0 where the GPU has no virtual memory management.
int64_t arena_granularity(int64_t device);

// The address of a new range without memory.
int64_t arena_reserve(int64_t num_bytes);

// New memory, of any content, for the beginning of a range.
void arena_map(int64_t address, int64_t num_bytes, int64_t device);

// The same bytes that were mapped; the caller has waited for the GPU.
void arena_unmap(int64_t address, int64_t num_bytes);

// Give back a range without memory.
void arena_free(int64_t address, int64_t num_bytes);

}  // namespace fastrl
