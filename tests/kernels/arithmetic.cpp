// The arithmetic of csrc/*.h as C functions on arrays, for tests/kernels/test_csrc.py.
#include <cstdint>
#include <vector>

#include "gae.h"
#include "kl.h"

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

void kl_all(const float* logprobs, const float* ref_logprobs, int64_t length, float* k1, float* k2,
            float* k3) {
    for (int64_t t = 0; t < length; ++t) {
        const KLEstimates kl = kl_estimates(logprobs[t], ref_logprobs[t]);
        k1[t] = kl.k1, k2[t] = kl.k2, k3[t] = kl.k3;
    }
}

void kl_all_gradients(const float* logprobs, const float* ref_logprobs, int64_t length,
                      const float* dk1, const float* dk2, const float* dk3, float* dlogprobs) {
    for (int64_t t = 0; t < length; ++t)
        dlogprobs[t] = kl_gradient(logprobs[t], ref_logprobs[t], dk1[t], dk2[t], dk3[t]);
}

}  // extern "C"
