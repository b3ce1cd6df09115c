// The launchers: plain pointers and sizes. Each returns null, or why its launch failed.
#pragma once

#include <cstdint>

namespace fastrl {

// Where to run. `stream` is a cudaStream_t of that device.
struct Launch {
    int device;
    void* stream;
};

// Padded: cu_seqlens null, rows of row_length. Packed: cu_seqlens [num_rows + 1].
// mask and row_stats may be null; row_stats [num_rows, 3] gets count, sum and sum of squares of
// the advantages.
const char* gae(const float* rewards, const float* values, const bool* mask,
                const int64_t* cu_seqlens, int64_t num_rows, int64_t row_length, float gamma,
                float decay, float* advantages, float* returns, double* row_stats, Launch launch);

}  // namespace fastrl
