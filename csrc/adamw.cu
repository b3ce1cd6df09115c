// adamw_step: all tensors in one launch, one pass over the bytes. Arithmetic: adamw.h.
//
// A block of 256 threads takes 16384 elements of one tensor, found through a table of addresses. A
// lane holds eight neighbours, a warp the 256 that share the scale of an 8-bit moment, so a scale is
// one maximum over a warp. Bytes per parameter: 28 in float32 (16 read, 12 written), 26 for bf16
// weights with remainders (14, 12), 14 with 8-bit moments besides (8, 6).
#include "adamw.h"
#include "common.cuh"
#include "kernels.h"

namespace fastrl {
namespace {

constexpr int ITEMS = 8;
constexpr int THREADS = 256;
constexpr int TILE = THREADS * ITEMS;
constexpr int COLUMNS = 9;
static_assert(WARP * ITEMS == SCALE_BLOCK && TENSOR_CHUNK % TILE == 0);

// A row of the table: addresses, whether the weight decays, and the number of elements.
struct Row {
    void* weight;
    const void* gradient;
    void* first;
    void* second;
    int16_t* remainder;
    float* first_scales;
    float* second_scales;
    bool decays;
    int64_t numel;
};

template <typename T>
__device__ __forceinline__ T* address(int64_t number) {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(number));
}

__device__ __forceinline__ Row read_row(const int64_t* row) {
    return {address<void>(row[0]),    address<void>(row[1]),  address<void>(row[2]),
            address<void>(row[3]),    address<int16_t>(row[4]), address<float>(row[5]),
            address<float>(row[6]),   row[7] != 0,              row[8]};
}

// The largest magnitude of the warp's values; NaN where one is NaN or infinite.
__device__ __forceinline__ float scale_of(const float (&values)[ITEMS]) {
    float largest = 0.0f;
    bool is_good = true;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        largest = fmaxf(largest, fabsf(values[k]));
        is_good = is_good && is_finite(values[k]);
    }
#pragma unroll
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, distance));
    return __all_sync(ALL_LANES, is_good) ? largest : as_float(0x7fffffffu);
}

template <bool IS_BF16>
__device__ __forceinline__ void load_weights(const Row& row, int64_t i, int64_t left,
                                             float (&weights)[ITEMS], float (&gradients)[ITEMS]) {
    if constexpr (IS_BF16) {
        uint16_t high[ITEMS], bits[ITEMS];
        int16_t low[ITEMS];
        load_pack(static_cast<const uint16_t*>(row.weight) + i, left, uint16_t{0}, high);
        load_pack(row.remainder + i, left, int16_t{0}, low);
        load_pack(static_cast<const uint16_t*>(row.gradient) + i, left, uint16_t{0}, bits);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            weights[k] = join_master(high[k], low[k]);
            gradients[k] = as_float(static_cast<uint32_t>(bits[k]) << 16);
        }
    } else {
        load_pack(static_cast<const float*>(row.weight) + i, left, 0.0f, weights);
        load_pack(static_cast<const float*>(row.gradient) + i, left, 0.0f, gradients);
    }
}

template <bool IS_BF16>
__device__ __forceinline__ void store_weights(const Row& row, int64_t i, int64_t left,
                                              const float (&weights)[ITEMS]) {
    if constexpr (IS_BF16) {
        uint16_t high[ITEMS];
        int16_t low[ITEMS];
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const SplitMaster split = split_master(weights[k]);
            high[k] = split.weight;
            low[k] = split.remainder;
        }
        store_pack(static_cast<uint16_t*>(row.weight) + i, left, high);
        store_pack(row.remainder + i, left, low);
    } else {
        store_pack(static_cast<float*>(row.weight) + i, left, weights);
    }
}

template <bool IS_8BIT>
__device__ __forceinline__ void load_moments(const Row& row, int64_t i, int64_t left,
                                             float (&first)[ITEMS], float (&second)[ITEMS]) {
    if constexpr (IS_8BIT) {
        int8_t first_codes[ITEMS];
        uint8_t second_codes[ITEMS];
        load_pack(static_cast<const int8_t*>(row.first) + i, left, int8_t{0}, first_codes);
        load_pack(static_cast<const uint8_t*>(row.second) + i, left, uint8_t{0}, second_codes);
        const bool is_inside = left > 0;
        const float first_scale = is_inside ? row.first_scales[i / SCALE_BLOCK] : 0.0f;
        const float second_scale = is_inside ? row.second_scales[i / SCALE_BLOCK] : 0.0f;
        const float first_unit = quotient(first_scale, FIRST_LEVELS * FIRST_LEVELS);
        const float second_unit = quotient(second_scale, SECOND_LEVELS * SECOND_LEVELS);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            first[k] = decode_moment(first_codes[k], first_unit);
            const float root = decode_moment(second_codes[k], second_unit);
            second[k] = product(root, root);
        }
    } else {
        load_pack(static_cast<const float*>(row.first) + i, left, 0.0f, first);
        load_pack(static_cast<const float*>(row.second) + i, left, 0.0f, second);
    }
}

// Values are 0 beyond `left`. The whole warp comes here.
__device__ __forceinline__ void store_codes(const Row& row, int64_t i, int64_t left,
                                            const float (&first)[ITEMS],
                                            const float (&roots)[ITEMS]) {
    const float first_scale = scale_of(first);
    const float second_scale = scale_of(roots);
    int8_t first_codes[ITEMS];
    uint8_t second_codes[ITEMS];
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) {
        first_codes[k] = static_cast<int8_t>(encode_first(first[k], first_scale));
        second_codes[k] = static_cast<uint8_t>(encode_root(roots[k], second_scale));
    }
    store_pack(static_cast<int8_t*>(row.first) + i, left, first_codes);
    store_pack(static_cast<uint8_t*>(row.second) + i, left, second_codes);
    if (left > 0 && threadIdx.x % WARP == 0) {
        row.first_scales[i / SCALE_BLOCK] = first_scale;
        row.second_scales[i / SCALE_BLOCK] = second_scale;
    }
}

template <bool IS_BF16, bool IS_8BIT>
__global__ void __launch_bounds__(THREADS)
    adamw_kernel(const int64_t* table, const int* chunks, const float* step_factors,
                 AdamWFactors factors) {
    const int64_t chunk = blockIdx.x;
    const Row row = read_row(table + COLUMNS * static_cast<int64_t>(chunks[2 * chunk]));
    const int64_t start = static_cast<int64_t>(chunks[2 * chunk + 1]) * TENSOR_CHUNK;
    const int64_t end = start + TENSOR_CHUNK < row.numel ? start + TENSOR_CHUNK : row.numel;
    factors.step_size = step_factors[0];
    factors.epsilon = step_factors[1];
    factors.scale = step_factors[2];
    if (!row.decays) factors.decay = 1.0f;
    for (int64_t tile = start; tile < end; tile += TILE) {
        const int64_t i = tile + threadIdx.x * ITEMS;
        const int64_t left = row.numel - i;
        float weights[ITEMS], gradients[ITEMS], first[ITEMS], second[ITEMS], roots[ITEMS];
        load_weights<IS_BF16>(row, i, left, weights, gradients);
        load_moments<IS_8BIT>(row, i, left, first, second);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) {
            const AdamWElement element =
                adamw_element(weights[k], gradients[k], first[k], second[k], factors);
            weights[k] = element.weight;
            first[k] = element.first;  // 0 beyond the end, where everything was loaded as 0
            second[k] = element.second;
            roots[k] = element.root;
        }
        store_weights<IS_BF16>(row, i, left, weights);
        if constexpr (IS_8BIT) {
            store_codes(row, i, left, first, roots);
        } else {
            store_pack(static_cast<float*>(row.first) + i, left, first);
            store_pack(static_cast<float*>(row.second) + i, left, second);
        }
    }
}

}  // namespace

const char* adamw(const int64_t* table, const int* chunks, int64_t num_chunks,
                  const float* step_factors, float beta1, float add_first, float beta2,
                  float add_second, float decay, bool is_bf16, bool is_8bit, Launch launch) {
    if (num_chunks == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto kernel = is_bf16 ? (is_8bit ? adamw_kernel<true, true> : adamw_kernel<true, false>)
                                : (is_8bit ? adamw_kernel<false, true> : adamw_kernel<false, false>);
    const AdamWFactors factors{beta1, add_first, beta2, add_second, decay, 0.0f, 0.0f, 0.0f};
    kernel<<<static_cast<unsigned>(num_chunks), THREADS, 0,
             static_cast<cudaStream_t>(launch.stream)>>>(table, chunks, step_factors, factors);
    return launch_error();
}

}  // namespace fastrl
