// grad_norm: the global L2 norm of a list of gradients in two launches, without atomics.
//
// A block adds up the squares of 16384 elements of one tensor, found through a table of addresses:
// a lane in float32, lanes and warps in float64, in a fixed order. One more block merges the sums
// of all blocks in float64 and takes the root. Reads every gradient once.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common.cuh"
#include "kernels.h"

namespace fastrl {
namespace {

constexpr int ITEMS = 8;
constexpr int THREADS = 256;
constexpr int TILE = THREADS * ITEMS;
constexpr int MERGE_THREADS = 1024;
static_assert(TENSOR_CHUNK % TILE == 0);

__device__ __forceinline__ float number(float value) { return value; }
__device__ __forceinline__ float number(__half value) { return __half2float(value); }
__device__ __forceinline__ float number(__nv_bfloat16 value) { return __bfloat162float(value); }

// The sum over the block in a fixed order, in thread 0.
template <int NUM_THREADS>
__device__ double block_sum(double value) {
    __shared__ double parts[NUM_THREADS / WARP];
    for (int distance = WARP / 2; distance > 0; distance /= 2)
        value += __shfl_down_sync(ALL_LANES, value, distance);
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    double total = 0.0;
    for (int warp = 0; warp < NUM_THREADS / WARP; ++warp) total += parts[warp];
    return total;
}

template <typename T>
__global__ void __launch_bounds__(THREADS)
    grad_norm_parts_kernel(const int64_t* table, const int* chunks, double* sums) {
    const int64_t chunk = blockIdx.x;
    const int64_t* row = table + 2 * static_cast<int64_t>(chunks[2 * chunk]);
    const T* gradient = reinterpret_cast<const T*>(static_cast<uintptr_t>(row[0]));
    const int64_t numel = row[1];
    const int64_t start = static_cast<int64_t>(chunks[2 * chunk + 1]) * TENSOR_CHUNK;
    const int64_t end = start + TENSOR_CHUNK < numel ? start + TENSOR_CHUNK : numel;
    float squares[ITEMS] = {};
    for (int64_t tile = start; tile < end; tile += TILE) {
        const int64_t i = tile + threadIdx.x * ITEMS;
        T items[ITEMS];
        load_pack(gradient + i, numel - i, T(0.0f), items);
#pragma unroll
        for (int k = 0; k < ITEMS; ++k) squares[k] += number(items[k]) * number(items[k]);
    }
    double total = 0.0;
#pragma unroll
    for (int k = 0; k < ITEMS; ++k) total += squares[k];
    total = block_sum<THREADS>(total);
    if (threadIdx.x == 0) sums[chunk] = total;
}

__global__ void __launch_bounds__(MERGE_THREADS)
    grad_norm_merge_kernel(const double* sums, int64_t count, double* norm) {
    double total = 0.0;
    for (int64_t i = threadIdx.x; i < count; i += MERGE_THREADS) total += sums[i];
    total = block_sum<MERGE_THREADS>(total);
    if (threadIdx.x == 0) *norm = sqrt(total);
}

}  // namespace

const char* grad_norm_parts(const int64_t* table, const int* chunks, int64_t num_chunks,
                            FloatType type, double* sums, Launch launch) {
    if (num_chunks == 0) return nullptr;
    cudaSetDevice(launch.device);
    const auto kernel = type == FloatType::float32   ? grad_norm_parts_kernel<float>
                        : type == FloatType::float16 ? grad_norm_parts_kernel<__half>
                                                     : grad_norm_parts_kernel<__nv_bfloat16>;
    kernel<<<static_cast<unsigned>(num_chunks), THREADS, 0,
             static_cast<cudaStream_t>(launch.stream)>>>(table, chunks, sums);
    return launch_error();
}

const char* grad_norm_merge(const double* sums, int64_t count, double* norm, Launch launch) {
    cudaSetDevice(launch.device);
    grad_norm_merge_kernel<<<1, MERGE_THREADS, 0, static_cast<cudaStream_t>(launch.stream)>>>(
        sums, count, norm);
    return launch_error();
}

}  // namespace fastrl
