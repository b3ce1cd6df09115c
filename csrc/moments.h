// Count, mean, and sum of squares about that mean: of one number more, or of two parts together.
//
//     M = M_a + M_b + (mean_b - mean_a)^2 n_a n_b / n        (Chan, Golub, LeVeque 1983)
//
// Sums of plain squares would cancel where the mean is far from 0.
#pragma once

#include "host_device.h"

namespace fastrl {

struct Moments {
    float count;
    float mean;
    float squares;
};

FASTRL_HD Moments moments_of_nothing() { return {0.0f, 0.0f, 0.0f}; }

FASTRL_HD Moments moments_add(const Moments& part, float x) {
    const float count = part.count + 1.0f;
    const float gap = x - part.mean;
    const float mean = part.mean + gap / count;
    return {count, mean, part.squares + gap * (x - mean)};
}

FASTRL_HD Moments moments_merge(const Moments& a, const Moments& b) {
    const float count = a.count + b.count;
    if (count == 0.0f) return a;
    const float gap = b.mean - a.mean;
    const float share = b.count / count;
    return {count, a.mean + gap * share, a.squares + b.squares + gap * gap * a.count * share};
}

}  // namespace fastrl
