// One element of AdamW, the master of a bf16 weight, and the 8-bit codes of its moments.
//
//     m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
//     w <- w decay - step_size m / (sqrt(v) + epsilon)
//     code = sign(x) floor(levels sqrt(|x| / scale) + 1/2)        scale = max |x| of 256 neighbours
//
// Every operation is rounded by itself, so that this, Triton and torch on a CPU give equal bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastrl {

// Elements that share a scale.
constexpr int SCALE_BLOCK = 256;
constexpr float FIRST_LEVELS = 127.0f;
constexpr float SECOND_LEVELS = 255.0f;

// The constants of a step. decay is 1 - lr wd, or 1 where a tensor does not decay.
struct AdamWFactors {
    float keep_first, add_first, keep_second, add_second, decay;
    float step_size, epsilon, scale;
};

struct AdamWElement {
    float weight, first, second;
    float root;  // of second
};

// nvcc would contract a product and a sum to one rounding.
FASTRL_HD float product(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}

FASTRL_HD float sum(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fadd_rn(a, b);
#else
    return a + b;
#endif
}

FASTRL_HD float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

FASTRL_HD float square_root(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return std::sqrt(a);
#endif
}

FASTRL_HD AdamWElement adamw_element(float weight, float gradient, float first, float second,
                                     const AdamWFactors& f) {
    const float g = product(gradient, f.scale);
    const float m = sum(product(first, f.keep_first), product(g, f.add_first));
    const float v = sum(product(second, f.keep_second), product(product(g, f.add_second), g));
    const float root = square_root(v);
    const float change = quotient(product(m, f.step_size), sum(root, f.epsilon));
    return {sum(product(weight, f.decay), -change), m, v, root};
}

FASTRL_HD float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

FASTRL_HD uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A bf16 weight and the signed distance of the float32 from it, both as bits.
struct SplitMaster {
    uint16_t weight;
    int16_t remainder;
};

FASTRL_HD float join_master(uint16_t weight, int16_t remainder) {
    return as_float((static_cast<uint32_t>(weight) << 16) + static_cast<uint32_t>(remainder));
}

FASTRL_HD SplitMaster split_master(float master) {
    const uint32_t bits = as_bits(master);
    // A NaN must not be rounded up: 0x7fffffff would become -0.
    const uint32_t high = master != master ? bits >> 16 | 0x40u : (bits + 0x8000u) >> 16;
    return {static_cast<uint16_t>(high), static_cast<int16_t>(bits - (high << 16))};
}

FASTRL_HD bool is_finite(float value) { return std::fabs(value) < INFINITY; }

// unit is scale / levels^2.
FASTRL_HD float decode_moment(int code, float unit) {
    return product(static_cast<float>(code * (code < 0 ? -code : code)), unit);
}

// Without sign; 0 in a block whose scale is 0 or NaN.
FASTRL_HD int encode_moment(float magnitude, float scale, float levels) {
    if (!(scale > 0.0f)) return 0;
    return static_cast<int>(sum(product(square_root(quotient(magnitude, scale)), levels), 0.5f));
}

FASTRL_HD int encode_first(float first, float scale) {
    const int code = encode_moment(std::fabs(first), scale, FIRST_LEVELS);
    return first < 0.0f ? -code : code;
}

// At least 1 for a root that is not 0, so that no denominator vanishes.
FASTRL_HD int encode_root(float root, float scale) {
    const int code = encode_moment(root, scale, SECOND_LEVELS);
    return code == 0 && root > 0.0f && scale > 0.0f ? 1 : code;
}

}  // namespace fastrl
