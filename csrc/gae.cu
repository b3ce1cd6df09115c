// compute_gae: advantages and returns of padded or packed responses. Recurrence: gae.h.
//
// One block per response walks tiles of 1024 tokens from the end. A thread composes four tokens,
// a warp scans its threads with shuffles, warps meet in shared memory, the tile before continues
// from the carried pair. Tiles are counted from the first token, so a row's bits depend on the row
// alone, and packed equals padded. Reads 9 bytes, writes 8 bytes per token.
#include "common.cuh"
#include "gae.h"
#include "kernels.h"
#include "moments.h"

namespace fastrl {
namespace {

constexpr int ITEMS = 4;
constexpr int NUM_WARPS = 8;
constexpr int THREADS = NUM_WARPS * WARP;
constexpr int TILE = THREADS * ITEMS;

struct Tokens {
    float rewards[ITEMS];
    float values[ITEMS];
    bool keep[ITEMS];
};

__device__ __forceinline__ GaeMap shuffle_down(const GaeMap& map, int distance) {
    return {__shfl_down_sync(ALL_LANES, map.from_advantage, distance),
            __shfl_down_sync(ALL_LANES, map.from_value, distance),
            __shfl_down_sync(ALL_LANES, map.constant, distance),
            __shfl_down_sync(ALL_LANES, map.value, distance),
            __shfl_down_sync(ALL_LANES, map.has_value, distance)};
}

// Of each lane: the map of its own tokens and those of all later lanes.
__device__ __forceinline__ GaeMap scan_suffixes(GaeMap map, int lane) {
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const GaeMap later = shuffle_down(map, distance);
        if (lane + distance < WARP) map = gae_compose(map, later);
    }
    return map;
}

__device__ __forceinline__ Tokens load_tokens(const float* rewards, const float* values,
                                              const bool* mask, int64_t place, int64_t left) {
    Tokens tokens;
    load_pack(rewards + place, left, 0.0f, tokens.rewards);
    load_pack(values + place, left, 0.0f, tokens.values);
    if (mask != nullptr) {
        load_pack(mask + place, left, false, tokens.keep);
    } else {
#pragma unroll
        for (int i = 0; i < ITEMS; ++i) tokens.keep[i] = i < left;
    }
    return tokens;
}

// The block's moments, merged in a fixed order; thread 0 writes count, sum and centred squares.
__device__ void write_moments(Moments own, float* moments) {
    __shared__ Moments parts[NUM_WARPS];
    for (int distance = WARP / 2; distance > 0; distance /= 2) {
        const Moments other{__shfl_down_sync(ALL_LANES, own.count, distance),
                            __shfl_down_sync(ALL_LANES, own.mean, distance),
                            __shfl_down_sync(ALL_LANES, own.squares, distance)};
        own = moments_merge(own, other);
    }
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = own;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int warp = 1; warp < NUM_WARPS; ++warp) own = moments_merge(own, parts[warp]);
    moments[0] = own.count;
    moments[1] = own.mean * own.count;
    moments[2] = own.squares;
}

__global__ void __launch_bounds__(THREADS)
    gae_kernel(const float* rewards, const float* values, const bool* mask,
               const int64_t* cu_seqlens, int64_t row_length, float gamma, float decay,
               float* advantages, float* returns, float* moments) {
    // Two buffers: a warp may be one tile ahead of another, never two.
    __shared__ GaeMap warp_maps[2][NUM_WARPS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int64_t row = blockIdx.x;
    const int64_t start = cu_seqlens == nullptr ? row * row_length : cu_seqlens[row];
    const int64_t length = cu_seqlens == nullptr ? row_length : cu_seqlens[row + 1] - start;
    Following carried{0.0f, 0.0f};
    Moments own_moments = moments_of_nothing();

    for (int64_t tile = (length + TILE - 1) / TILE - 1; tile >= 0; --tile) {
        const int64_t column = tile * TILE + threadIdx.x * ITEMS;
        const int64_t left = length - column;
        const Tokens tokens = load_tokens(rewards, values, mask, start + column, left);
        GaeMap own = gae_identity();
#pragma unroll
        for (int i = ITEMS - 1; i >= 0; --i) {
            if (!tokens.keep[i]) continue;
            own = gae_compose(gae_token(tokens.rewards[i], tokens.values[i], gamma, decay), own);
        }
        const GaeMap suffix = scan_suffixes(own, lane);
        GaeMap later = shuffle_down(suffix, 1);
        if (lane == WARP - 1) later = gae_identity();
        GaeMap* maps = warp_maps[tile % 2];
        if (lane == 0) maps[warp] = suffix;
        __syncthreads();
        Following next{0.0f, 0.0f};
#pragma unroll
        for (int w = NUM_WARPS - 1; w >= 0; --w) {
            if (w == warp) next = gae_apply(later, carried);
            carried = gae_apply(maps[w], carried);
        }
        float tile_advantages[ITEMS], tile_returns[ITEMS];
#pragma unroll
        for (int i = ITEMS - 1; i >= 0; --i) {
            tile_advantages[i] = tile_returns[i] = 0.0f;
            if (!tokens.keep[i]) continue;
            next = gae_step(tokens.rewards[i], tokens.values[i], gamma, decay, next);
            tile_advantages[i] = next.advantage;
            tile_returns[i] = next.advantage + tokens.values[i];
            own_moments = moments_add(own_moments, next.advantage);
        }
        store_pack(advantages + start + column, left, tile_advantages);
        store_pack(returns + start + column, left, tile_returns);
    }
    if (moments != nullptr) write_moments(own_moments, moments + 3 * row);
}

}  // namespace

const char* gae(const float* rewards, const float* values, const bool* mask,
                const int64_t* cu_seqlens, int64_t num_rows, int64_t row_length, float gamma,
                float decay, float* advantages, float* returns, float* moments, Launch launch) {
    if (num_rows == 0) return nullptr;
    cudaSetDevice(launch.device);
    gae_kernel<<<static_cast<unsigned>(num_rows), THREADS, 0,
                 static_cast<cudaStream_t>(launch.stream)>>>(
        rewards, values, mask, cu_seqlens, row_length, gamma, decay, advantages, returns, moments);
    return launch_error();
}

}  // namespace fastrl
