// The arithmetic of csrc/*.h as C functions on arrays, for tests/kernels/test_csrc.py.
#include <cstdint>
#include <vector>

#include "gae.h"

using namespace fastrl;

extern "C" {

// One row, token by token from the end.
void gae_by_steps(const float* rewards, const float* values, const bool* keep, int64_t length,
                  float gamma, float decay, float* advantages) {
    Following next{0.0f, 0.0f};
    for (int64_t t = length - 1; t >= 0; --t) {
        if (keep[t]) next = gae_step(rewards[t], values[t], gamma, decay, next);
        advantages[t] = keep[t] ? next.advantage : 0.0f;
    }
}

// One row as a kernel does it: suffix maps by doubling distances, applied to "nothing follows".
void gae_by_scan(const float* rewards, const float* values, const bool* keep, int64_t length,
                 float gamma, float decay, float* advantages) {
    std::vector<GaeMap> maps;
    for (int64_t t = 0; t < length; ++t)
        maps.push_back(keep[t] ? gae_token(rewards[t], values[t], gamma, decay) : gae_identity());
    for (int64_t distance = 1; distance < length; distance *= 2)
        for (int64_t t = 0; t + distance < length; ++t)  // t + distance still has its old value
            maps[t] = gae_compose(maps[t], maps[t + distance]);
    for (int64_t t = 0; t < length; ++t)
        advantages[t] = keep[t] ? gae_apply(maps[t], {0.0f, 0.0f}).advantage : 0.0f;
}

}  // extern "C"
