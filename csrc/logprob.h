// Log-prob and entropy of a row of logits from running sums, and the gradient of its logits.
//
//     z = logit / temperature    m = max z    s = sum e^(z - m)    t = sum e^(z - m) (z - m)
//     logprob = z_token - m - log s        H = log s - t / s
//
// Relative to m nothing cancels. A column of -inf adds nothing, a row of nothing else is NaN.
#pragma once

#include <cmath>

#include "host_device.h"

namespace fastrl {

// e^-10000 is 0 in float32. In place of -inf, products with that 0 are 0 and not NaN.
constexpr float NEGLIGIBLE = -1e4f;

struct RowSums {
    float maximum;
    float sum;
    float weighted;
};

FASTRL_HD RowSums row_nothing() { return {-INFINITY, 0.0f, 0.0f}; }

FASTRL_HD float row_origin(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

// The same columns, relative to a maximum that is at least as large.
FASTRL_HD RowSums row_rescale(const RowSums& sums, float maximum) {
    const float shift = fmaxf(sums.maximum - row_origin(maximum), NEGLIGIBLE);
    const float scale = expf(shift);
    return {maximum, sums.sum * scale, (sums.weighted + sums.sum * shift) * scale};
}

// N more columns, added up before they meet the others: two short sums lose less than a long one.
// fmaxf passes over NaN, which reaches the sums by itself.
template <int N>
FASTRL_HD void row_add(RowSums& sums, const float (&z)[N]) {
    float maximum = sums.maximum;
    for (int i = 0; i < N; ++i) maximum = fmaxf(maximum, z[i]);
    if (maximum > sums.maximum) sums = row_rescale(sums, maximum);
    const float origin = row_origin(sums.maximum);
    float sum = 0.0f, weighted = 0.0f;
    for (int i = 0; i < N; ++i) {
        const float gap = z[i] - origin;
        const float e = expf(gap);
        sum += e;
        weighted += e * fmaxf(gap, NEGLIGIBLE);
    }
    sums.sum += sum;
    sums.weighted += weighted;
}

FASTRL_HD RowSums row_merge(const RowSums& left, const RowSums& right) {
    const float maximum = fmaxf(left.maximum, right.maximum);
    const RowSums a = row_rescale(left, maximum);
    const RowSums b = row_rescale(right, maximum);
    return {maximum, a.sum + b.sum, a.weighted + b.weighted};
}

// What the backward pass keeps of a row.
struct RowStats {
    float maximum;
    float log_sum;
    float entropy;
};

FASTRL_HD RowStats row_stats(const RowSums& sums) {
    const float log_sum = logf(sums.sum);
    return {sums.maximum, log_sum, log_sum - sums.weighted / sums.sum};
}

FASTRL_HD float row_logprob(const RowStats& row, float z) { return z - row.maximum - row.log_sum; }

// d(loss) / dz: dlogprob (onehot - p) - dentropy p (log p + H).
FASTRL_HD float row_gradient(const RowStats& row, float z, bool is_token, float dlogprob,
                             float dentropy) {
    const float logprob = row_logprob(row, z);
    const float p = expf(logprob);
    const float by_entropy = dentropy * p * (fmaxf(logprob, NEGLIGIBLE) + row.entropy);
    return (is_token ? dlogprob : 0.0f) - p * dlogprob - by_entropy;
}

}  // namespace fastrl
