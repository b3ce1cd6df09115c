// The arithmetic of csrc/*.h as C functions on arrays, for tests/kernels/test_csrc.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "adamw.h"
#include "gae.h"
#include "kl.h"
#include "kv_cache.h"
#include "logprob.h"
#include "moments.h"
#include "sampling.h"

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

// Moments of `length` numbers, added one by one in each of `num_parts` parts, which are merged from
// the last to the first: count, sum, squares about the mean.
void moments_of_parts(const float* values, int64_t length, int64_t num_parts, float* moments) {
    Moments all = moments_of_nothing();
    for (int64_t part = num_parts - 1; part >= 0; --part) {
        Moments own = moments_of_nothing();
        for (int64_t i = part; i < length; i += num_parts) own = moments_add(own, values[i]);
        all = moments_merge(own, all);
    }
    moments[0] = all.count, moments[1] = all.mean * all.count, moments[2] = all.squares;
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

// One row as a block of `threads` does it, `step` neighbours a thread at a time: each thread adds its
// columns, then neighbours merge at doubling distances within warps of 32, then warp after warp.
void logprob_row(const float* z, int64_t length, int64_t threads, float* stats) {
    constexpr int STEP = 16;
    std::vector<RowSums> sums(threads, row_nothing());
    for (int64_t start = 0; start < length; start += STEP) {
        float part[STEP];
        for (int i = 0; i < STEP; ++i) part[i] = start + i < length ? z[start + i] : -INFINITY;
        row_add(sums[start / STEP % threads], part);
    }
    RowSums total = row_nothing();
    for (int64_t warp = 0; warp < threads; warp += 32) {
        for (int64_t distance = 16; distance > 0; distance /= 2)
            for (int64_t lane = warp; lane < warp + distance; ++lane)
                sums[lane] = row_merge(sums[lane], sums[lane + distance]);
        total = warp == 0 ? sums[0] : row_merge(total, sums[warp]);
    }
    const RowStats row = row_stats(total);
    stats[0] = row.maximum, stats[1] = row.log_sum, stats[2] = row.entropy;
}

void logprob_gradient(const float* z, int64_t length, const float* stats, int64_t token,
                      float dlogprob, float dentropy, float* logprobs, float* gradient) {
    const RowStats row{stats[0], stats[1], stats[2]};
    for (int64_t v = 0; v < length; ++v) {
        logprobs[v] = row_logprob(row, z[v]);
        gradient[v] = row_gradient(row, z[v], v == token, dlogprob, dentropy);
    }
}

// One step of a float32 tensor; step_factors is step_size, epsilon, scale.
void adamw_floats(float* weights, const float* gradients, float* first, float* second,
                  int64_t length, const float* betas, float decay, const float* step_factors) {
    const AdamWFactors factors{betas[0], betas[1],        betas[2],        betas[3],
                               decay,    step_factors[0], step_factors[1], step_factors[2]};
    for (int64_t i = 0; i < length; ++i) {
        const AdamWElement element =
            adamw_element(weights[i], gradients[i], first[i], second[i], factors);
        weights[i] = element.weight, first[i] = element.first, second[i] = element.second;
    }
}

// NaN where a value is NaN or infinite.
static float largest_of(const std::vector<float>& values) {
    float largest = 0.0f;
    for (float value : values) {
        if (!is_finite(value)) return NAN;
        largest = std::max(largest, std::fabs(value));
    }
    return largest;
}

// One step of a bf16 tensor with remainders and 8-bit moments, block by block.
void adamw_codes(uint16_t* weights, const uint16_t* gradients, int8_t* first, uint8_t* second,
                 int64_t length, const float* betas, float decay, const float* step_factors,
                 int16_t* remainders, float* first_scales, float* second_scales) {
    const AdamWFactors factors{betas[0], betas[1],        betas[2],        betas[3],
                               decay,    step_factors[0], step_factors[1], step_factors[2]};
    for (int64_t begin = 0; begin < length; begin += SCALE_BLOCK) {
        const int64_t end = std::min<int64_t>(begin + SCALE_BLOCK, length);
        float& first_scale = first_scales[begin / SCALE_BLOCK];
        float& second_scale = second_scales[begin / SCALE_BLOCK];
        const float first_unit = quotient(first_scale, FIRST_LEVELS * FIRST_LEVELS);
        const float second_unit = quotient(second_scale, SECOND_LEVELS * SECOND_LEVELS);
        std::vector<float> moments, roots;
        for (int64_t i = begin; i < end; ++i) {
            const float root = decode_moment(second[i], second_unit);
            const AdamWElement element = adamw_element(
                join_master(weights[i], remainders[i]),
                as_float(static_cast<uint32_t>(gradients[i]) << 16),
                decode_moment(first[i], first_unit), product(root, root), factors);
            const SplitMaster split = split_master(element.weight);
            weights[i] = split.weight, remainders[i] = split.remainder;
            moments.push_back(element.first);
            roots.push_back(element.root);
        }
        first_scale = largest_of(moments);
        second_scale = largest_of(roots);
        for (int64_t i = begin; i < end; ++i) {
            first[i] = static_cast<int8_t>(encode_first(moments[i - begin], first_scale));
            second[i] = static_cast<uint8_t>(encode_root(roots[i - begin], second_scale));
        }
    }
}

uint32_t sample_word(int64_t seed, int64_t position) { return random_word(seed, position); }

float sample_adjusted(float logit, int is_seen, int is_stop, float temperature, float penalty,
                      int suppresses) {
    return adjusted_score(logit, is_seen != 0, is_stop != 0,
                          {temperature, penalty, suppresses != 0});
}

// The largest score such that what is at least that, and at least `floor`, amounts to `wanted`.
static float least_kept(const float* z, int64_t length, float maximum, float floor,
                        uint64_t wanted, bool by_mass) {
    Selection found{0, wanted};
    for (int digit = 0; digit < NUM_DIGITS; ++digit) {
        uint64_t bins[RADIX] = {}, above = 0;
        for (int64_t v = 0; v < length; ++v)
            if (z[v] >= floor && has_prefix(order_of(z[v]), found, digit))
                bins[digit_of(order_of(z[v]), digit)] += by_mass ? token_mass(z[v] - maximum) : 1;
        const int bin = crossing_bin<RADIX>(bins, 0, found.wanted, above);
        if (bin >= 0) found = with_digit(found, digit, bin, above);
    }
    return score_of(found.prefix);
}

// One row of scores as csrc/sampling.cu draws from it. Returns the token; `floor` gets the least
// score that is kept.
int64_t sample_row(const float* z, int64_t length, int64_t seed, int64_t position, int64_t top_k,
                   float top_p, float min_p, float* floor) {
    float maximum = -INFINITY;
    for (int64_t v = 0; v < length; ++v) maximum = fmaxf(maximum, z[v]);
    *floor = -INFINITY;
    if (top_k > 0 && top_k < length)
        *floor = least_kept(z, length, maximum, *floor, static_cast<uint64_t>(top_k), false);
    if (top_p < 1.0f) {
        uint64_t total = 0;
        for (int64_t v = 0; v < length; ++v)
            if (z[v] >= *floor) total += token_mass(z[v] - maximum);
        *floor = fmaxf(*floor, least_kept(z, length, maximum, *floor, wanted_mass(top_p, total),
                                          true));
    }
    if (min_p > 0.0f) *floor = fmaxf(*floor, maximum + logf(min_p));
    std::vector<uint64_t> masses;
    uint64_t total = 0;
    for (int64_t v = 0; v < length; ++v) {
        masses.push_back(z[v] < *floor ? 0 : token_mass(z[v] - maximum));
        total += masses.back();
    }
    uint64_t target = draw_target(random_word(seed, position), total);
    const int token = first_past(masses.data(), static_cast<int>(length), target);
    return token == length ? length - 1 : token;
}

// One head as a kernel writes it: `lanes` add up every `lanes`-th square, meet at halving distances,
// then the first 2 half channels turn. weight may be null.
void turn_head(const float* x, const float* weight, const float* cos, const float* sin,
               int64_t num_channels, int64_t half, int64_t lanes, float epsilon, float* out) {
    std::vector<float> sums(lanes, 0.0f);
    for (int64_t c = 0; c < num_channels; ++c) sums[c % lanes] += x[c] * x[c];
    for (int64_t distance = lanes / 2; distance > 0; distance /= 2)
        for (int64_t lane = 0; lane < distance; ++lane) sums[lane] += sums[lane + distance];
    const float rstd = inverse_rms(sums[0], static_cast<int>(num_channels), epsilon);
    for (int64_t c = 0; c < num_channels; ++c)
        out[c] = weight == nullptr ? x[c] : x[c] * rstd * weight[c];
    for (int64_t c = 0; c < half; ++c) {
        const Pair turned = turn_pair({out[c], out[half + c]}, cos[c], sin[c]);
        out[c] = turned.first, out[half + c] = turned.second;
    }
}

int64_t kv_row_of(int64_t slot, int64_t layer, int64_t side, int64_t num_layers,
                  int64_t page_size) {
    return kv_row(slot, layer, static_cast<int>(side), num_layers, page_size);
}

}  // extern "C"
