// Where a token's keys and values lie in the pages, and what queries and keys go through before.
//
//     slot = page * page_size + offset        x <- weight round(x rstd)
//     (x_i, x_{i + R/2}) <- (x_i cos - x_{i + R/2} sin, x_{i + R/2} cos + x_i sin)
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace fastrl {

// The row [Hk, C] of a slot in pages [num_pages, L, 2, page_size]; side 0 is keys, 1 is values.
FASTRL_HD int64_t kv_row(int64_t slot, int64_t layer, int side, int64_t num_layers,
                         int64_t page_size) {
    return ((slot / page_size * num_layers + layer) * 2 + side) * page_size + slot % page_size;
}

FASTRL_HD float inverse_rms(float squares, int num_channels, float epsilon) {
    return 1.0f / sqrtf(squares / static_cast<float>(num_channels) + epsilon);
}

struct Pair {
    float first;
    float second;
};

// Which product meets the sum unrounded is written down, so that no compiler chooses.
FASTRL_HD Pair turn_pair(const Pair& x, float cos, float sin) {
    return {fmaf(x.first, cos, -(x.second * sin)), fmaf(x.second, cos, x.first * sin)};
}

}  // namespace fastrl
