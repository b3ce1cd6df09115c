// Draw a token from a row of logits by inverse CDF, from counter-based random numbers.
//
//     z = adjust(logit) / temperature    mass = floor(2^43 e^(z - max z))    kept: z >= floor
//     token = first v with mass_0 + ... + mass_v > u sum(mass),    u = (word + 1/2) / 2^32
//
// Masses are integers, so that sums do not depend on their order, running sums never decrease, and
// a token of mass 0 is never drawn: no rounding has to be repaired. 2^20 tokens fit 64 bits; what
// is below 2^-43 of the most likely token counts as 0, and a word has 32 bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace fastrl {

constexpr double ONE = 8796093022208.0;  // 2^43
constexpr int RADIX = 256;
constexpr int NUM_DIGITS = 4;

// First word of Philox4x32-10 with the seed as key and the position as counter.
// Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
FASTRL_HD uint32_t random_word(int64_t seed, int64_t position) {
    const uint64_t key = static_cast<uint64_t>(seed), counter = static_cast<uint64_t>(position);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
    uint32_t c2 = 0, c3 = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
        const uint32_t next0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
        const uint32_t next2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
        c1 = static_cast<uint32_t>(b);
        c3 = static_cast<uint32_t>(a);
        c0 = next0;
        c2 = next2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

// How one row is drawn from.
struct RowSettings {
    float temperature;
    float penalty;    // of tokens that were seen
    bool suppresses;  // no stop token
};

FASTRL_HD float adjusted_score(float logit, bool is_seen, bool is_stop,
                               const RowSettings& settings) {
    if (is_seen) logit = logit > 0.0f ? logit / settings.penalty : logit * settings.penalty;
    if (is_stop && settings.suppresses) logit = -INFINITY;
    return logit / settings.temperature;
}

// An unsigned number that is larger where the score is, and back.
FASTRL_HD uint32_t order_of(float z) {
    uint32_t bits;
    memcpy(&bits, &z, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

FASTRL_HD float score_of(uint32_t order) {
    const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
    float z;
    memcpy(&z, &bits, sizeof z);
    return z;
}

// gap = z - max z. NaN has no mass.
FASTRL_HD uint64_t token_mass(float gap) {
    return gap <= 0.0f ? static_cast<uint64_t>(ONE * static_cast<double>(expf(gap))) : 0;
}

// floor((word + 1/2) / 2^32 * total): below total, which is below 2^63.
FASTRL_HD uint64_t draw_target(uint32_t word, uint64_t total) {
    const uint64_t w = word;
    const uint64_t high = w * (total >> 32), low = w * (total & 0xffffffffu);
    return high + (low >> 32) + (((low & 0xffffffffu) + (total >> 1)) >> 32);
}

// The least mass that is a share of top_p.
FASTRL_HD uint64_t wanted_mass(float top_p, uint64_t total) {
    const uint64_t wanted =
        static_cast<uint64_t>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
    return wanted < 1 ? 1 : wanted > total ? total : wanted;
}

// Selecting the largest order t such that all that are at least t amount to `wanted`, one digit
// at a time from the highest.
struct Selection {
    uint32_t prefix;  // digits found so far
    uint64_t wanted;  // what orders with this prefix have to amount to
};

FASTRL_HD bool has_prefix(uint32_t order, const Selection& found, int digit) {
    return digit == 0 || (order ^ found.prefix) >> (32 - 8 * digit) == 0;
}

FASTRL_HD int digit_of(uint32_t order, int digit) { return (order >> (24 - 8 * digit)) & 255; }

// The largest bin such that it and those above it, after `above`, amount to what is wanted; the
// bins are [first, first + N). -1: not in these. `above` grows by what lies above that bin.
template <int N>
FASTRL_HD int crossing_bin(const uint64_t* bins, int first, uint64_t wanted, uint64_t& above) {
    for (int i = first + N - 1; i >= first; --i) {
        if (above + bins[i] >= wanted) return i;
        above += bins[i];
    }
    return -1;
}

FASTRL_HD Selection with_digit(const Selection& found, int digit, int bin, uint64_t above) {
    return {found.prefix | static_cast<uint32_t>(bin) << (24 - 8 * digit), found.wanted - above};
}

// Index of the first of `count` masses whose running sum passes `target`; `target` is reduced by
// what comes before. `count`: none does.
FASTRL_HD int first_past(const uint64_t* masses, int count, uint64_t& target) {
    for (int i = 0; i < count; ++i) {
        if (masses[i] > target) return i;
        target -= masses[i];
    }
    return count;
}

}  // namespace fastrl
