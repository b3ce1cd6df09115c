// Estimates of KL(policy || reference) from a token that the policy drew.
//
//     u = ref_logprob - logprob        k1 = -u        k2 = u^2 / 2        k3 = exp(u) - 1 - u
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastrl {

struct KLEstimates {
    float k1;
    float k2;
    float k3;
};

// Beyond it k3 is meaningless but must stay finite; NaN passes.
constexpr float MAX_EXPONENT = 20.0f;

FASTRL_HD KLEstimates kl_estimates(float logprob, float ref_logprob) {
    const float k1 = logprob - ref_logprob;
    const float u = -k1 > MAX_EXPONENT ? MAX_EXPONENT : -k1;
    return {k1, 0.5f * k1 * k1, expm1f(u) - u};
}

// d(loss) / d(logprob); the derivative by ref_logprob is its negative.
FASTRL_HD float kl_gradient(float logprob, float ref_logprob, float dk1, float dk2, float dk3) {
    const float k1 = logprob - ref_logprob;
    const float by_k3 = -k1 > MAX_EXPONENT ? 0.0f : -expm1f(-k1);
    return dk1 + dk2 * k1 + dk3 * by_k3;
}

}  // namespace fastrl
