// gather_logprobs: log-prob of one token per row and the row's entropy, in one read. Sums: logprob.h.
//
// One block of 256 threads per row. A step of a thread is 16 columns, in loads of 16 bytes where the
// vocabulary is a multiple of such a load, else of one column, so that which thread adds which
// column depends on the vocabulary and the type alone; lanes meet by shuffles, warps in shared
// memory, in a fixed order. Forward reads 2V (half precision) or 4V bytes per row; the gradient
// reads and writes as much, and may be written over the logits.
#include "common.cuh"
#include "float_types.cuh"
#include "kernels.h"
#include "logprob.h"

namespace fastrl {
namespace {

constexpr int ITEMS = 16;
constexpr int NUM_WARPS = 8;
constexpr int THREADS = NUM_WARPS * WARP;
constexpr int TILE = THREADS * ITEMS;

// First column of load `j` of this thread: neighbours of a warp load neighbours.
template <int N>
__device__ __forceinline__ int first_column(int tile, int j) {
    return tile + (j * THREADS + static_cast<int>(threadIdx.x)) * N;
}

// z of the 16 columns of this thread's step; -inf where there are none.
template <int N, typename T>
__device__ __forceinline__ void load_scores(const T* row, int tile, int num_columns,
                                            float inverse_temperature, float (&z)[ITEMS]) {
    T loaded[ITEMS / N][N];
    T nothing;
    narrow(-INFINITY, nothing);
#pragma unroll
    for (int j = 0; j < ITEMS / N; ++j) {
        const int column = first_column<N>(tile, j);
        load_pack(row + column, num_columns - column, nothing, loaded[j]);
    }
#pragma unroll
    for (int j = 0; j < ITEMS / N; ++j)
#pragma unroll
        for (int i = 0; i < N; ++i) z[j * N + i] = widen(loaded[j][i]) * inverse_temperature;
}

__device__ __forceinline__ RowSums shuffle_down(const RowSums& sums, int distance) {
    return {__shfl_down_sync(ALL_LANES, sums.maximum, distance),
            __shfl_down_sync(ALL_LANES, sums.sum, distance),
            __shfl_down_sync(ALL_LANES, sums.weighted, distance)};
}

// The sums of the whole row, in thread 0.
__device__ RowSums merge_block(RowSums sums) {
    __shared__ RowSums of_warp[NUM_WARPS];
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        sums = row_merge(sums, shuffle_down(sums, distance));
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = sums;
    __syncthreads();
    if (threadIdx.x == 0)
        for (int warp = 1; warp < NUM_WARPS; ++warp) sums = row_merge(sums, of_warp[warp]);
    return sums;
}

template <int N, typename T>
__global__ void __launch_bounds__(THREADS)
    gather_logprobs_kernel(const T* logits, int64_t stride, int num_columns,
                           const int64_t* token_ids, float inverse_temperature, float* logprobs,
                           float* entropy, float* maximum, float* log_sum) {
    const int64_t row = blockIdx.x;
    const T* source = logits + row * stride;
    RowSums sums = row_nothing();
    for (int tile = 0; tile < num_columns; tile += TILE) {
        float z[ITEMS];
        load_scores<N>(source, tile, num_columns, inverse_temperature, z);
        row_add(sums, z);
    }
    sums = merge_block(sums);
    if (threadIdx.x != 0) return;
    const RowStats stats = row_stats(sums);
    const int64_t token = token_ids[row];
    const bool exists = token >= 0 && token < num_columns;
    const float z = exists ? widen(source[token]) * inverse_temperature : NAN;
    logprobs[row] = row_logprob(stats, z);
    entropy[row] = stats.entropy;
    maximum[row] = stats.maximum;
    log_sum[row] = stats.log_sum;
}

// `gradient` may be `logits`: a thread writes what it alone has read.
template <int N, typename T>
__global__ void __launch_bounds__(THREADS)
    gather_logprobs_gradient_kernel(const T* logits, int64_t stride, int num_columns,
                                    const int64_t* token_ids, const float* entropy,
                                    const float* maximum, const float* log_sum,
                                    const float* dlogprobs, const float* dentropy,
                                    float inverse_temperature, T* gradient,
                                    int64_t gradient_stride) {
    const int64_t row = blockIdx.x;
    const T* source = logits + row * stride;
    T* target = gradient + row * gradient_stride;
    const int64_t token = token_ids[row];
    const RowStats stats{maximum[row], log_sum[row], entropy[row]};
    const float by_logprob = dlogprobs[row];
    const float by_entropy = dentropy == nullptr ? 0.0f : dentropy[row];
    for (int tile = 0; tile < num_columns; tile += TILE) {
        float z[ITEMS];
        load_scores<N>(source, tile, num_columns, inverse_temperature, z);
#pragma unroll
        for (int j = 0; j < ITEMS / N; ++j) {
            const int column = first_column<N>(tile, j);
            T written[N];
#pragma unroll
            for (int i = 0; i < N; ++i)
                narrow(inverse_temperature * row_gradient(stats, z[j * N + i], column + i == token,
                                                          by_logprob, by_entropy),
                       written[i]);
            store_pack(target + column, num_columns - column, written);
        }
    }
}

template <typename T>
void launch_forward(const LogitRows& logits, const int64_t* token_ids, float inverse_temperature,
                    float* logprobs, float* entropy, float* maximum, float* log_sum,
                    cudaStream_t stream) {
    const auto kernel = logits.num_columns % PACK<T> == 0 ? gather_logprobs_kernel<PACK<T>, T>
                                                          : gather_logprobs_kernel<1, T>;
    kernel<<<static_cast<unsigned>(logits.num_rows), THREADS, 0, stream>>>(
        static_cast<const T*>(logits.data), logits.stride, logits.num_columns, token_ids,
        inverse_temperature, logprobs, entropy, maximum, log_sum);
}

template <typename T>
void launch_gradient(const LogitRows& logits, const int64_t* token_ids, const float* entropy,
                     const float* maximum, const float* log_sum, const float* dlogprobs,
                     const float* dentropy, float inverse_temperature, void* gradient,
                     int64_t gradient_stride, cudaStream_t stream) {
    const auto kernel = logits.num_columns % PACK<T> == 0
                            ? gather_logprobs_gradient_kernel<PACK<T>, T>
                            : gather_logprobs_gradient_kernel<1, T>;
    kernel<<<static_cast<unsigned>(logits.num_rows), THREADS, 0, stream>>>(
        static_cast<const T*>(logits.data), logits.stride, logits.num_columns, token_ids, entropy,
        maximum, log_sum, dlogprobs, dentropy, inverse_temperature, static_cast<T*>(gradient),
        gradient_stride);
}

}  // namespace

const char* gather_logprobs(const LogitRows& logits, const int64_t* token_ids,
                            float inverse_temperature, float* logprobs, float* entropy,
                            float* maximum, float* log_sum, Launch launch) {
    if (logits.num_rows == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto run = logits.type == FloatType::float32   ? launch_forward<float>
                     : logits.type == FloatType::float16 ? launch_forward<__half>
                                                         : launch_forward<__nv_bfloat16>;
    run(logits, token_ids, inverse_temperature, logprobs, entropy, maximum, log_sum,
        static_cast<cudaStream_t>(launch.stream));
    return launch_error();
}

const char* gather_logprobs_gradient(const LogitRows& logits, const int64_t* token_ids,
                                     const float* entropy, const float* maximum,
                                     const float* log_sum, const float* dlogprobs,
                                     const float* dentropy, float inverse_temperature,
                                     void* gradient, int64_t gradient_stride, Launch launch) {
    if (logits.num_rows == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto run = logits.type == FloatType::float32   ? launch_gradient<float>
                     : logits.type == FloatType::float16 ? launch_gradient<__half>
                                                         : launch_gradient<__nv_bfloat16>;
    run(logits, token_ids, entropy, maximum, log_sum, dlogprobs, dentropy, inverse_temperature,
        gradient, gradient_stride, static_cast<cudaStream_t>(launch.stream));
    return launch_error();
}

}  // namespace fastrl
