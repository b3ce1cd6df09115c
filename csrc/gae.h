// The recurrence of generalised advantage estimation, one token at a time and as a scan.
//
//     delta_t = R_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}
//
// A token maps (advantage, value) of what follows it to its own. The map is affine, so maps of
// neighbours compose, in any grouping. A masked token is the identity.
#pragma once

#include "host_device.h"

namespace fastrl {

struct Following {
    float advantage;
    float value;
};

struct GaeMap {
    float from_advantage;  // advantage = constant + from_advantage A + from_value V
    float from_value;
    float constant;
    float value;    // value of the first unmasked token, where there is one
    int has_value;  // 0: every token is masked, V passes through
};

FASTRL_HD GaeMap gae_identity() { return {1.0f, 0.0f, 0.0f, 0.0f, 0}; }

// decay is gamma lam.
FASTRL_HD GaeMap gae_token(float reward, float value, float gamma, float decay) {
    return {decay, gamma, reward - value, value, 1};
}

FASTRL_HD Following gae_apply(const GaeMap& map, const Following& next) {
    const float advantage =
        map.constant + map.from_value * next.value + map.from_advantage * next.advantage;
    return {advantage, map.has_value ? map.value : next.value};
}

// The map of `earlier` followed by `later` in time.
FASTRL_HD GaeMap gae_compose(const GaeMap& earlier, const GaeMap& later) {
    GaeMap map;
    const float passed = later.has_value ? earlier.from_value * later.value : 0.0f;
    map.constant = earlier.constant + earlier.from_advantage * later.constant + passed;
    map.from_advantage = earlier.from_advantage * later.from_advantage;
    map.from_value = earlier.from_advantage * later.from_value +
                     (later.has_value ? 0.0f : earlier.from_value);
    map.value = earlier.has_value ? earlier.value : later.value;
    map.has_value = earlier.has_value | later.has_value;
    return map;
}

// One token, by the formula.
FASTRL_HD Following gae_step(float reward, float value, float gamma, float decay,
                             const Following& next) {
    const float delta = reward + gamma * next.value - value;
    return {delta + decay * next.advantage, value};
}

}  // namespace fastrl
