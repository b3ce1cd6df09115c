// kl_estimate and shape_rewards: k1, k2, k3 and the shaped reward in one launch. Formulas: kl.h.
//
// kl_estimate is one thread per token. In shape_rewards a block per response first looks for its
// last token in the mask, then writes every column. Reads 9 bytes, writes 4 bytes per token and
// output that is asked for.
#include "common.cuh"
#include "kernels.h"
#include "kl.h"

namespace fastrl {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ void write(float* target, int64_t place, float value) {
    if (target != nullptr) target[place] = value;
}

__global__ void __launch_bounds__(THREADS)
    kl_estimate_kernel(const float* logprobs, const float* ref_logprobs, const bool* mask,
                       int64_t numel, float* k1, float* k2, float* k3) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= numel) return;
    const bool keep = mask == nullptr || mask[i];
    const KLEstimates kl = keep ? kl_estimates(logprobs[i], ref_logprobs[i]) : KLEstimates{};
    k1[i] = kl.k1;
    k2[i] = kl.k2;
    k3[i] = kl.k3;
}

__global__ void __launch_bounds__(THREADS)
    kl_gradient_kernel(const float* logprobs, const float* ref_logprobs, const bool* mask,
                       const float* dk1, const float* dk2, const float* dk3, int64_t numel,
                       float* dlogprobs) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= numel) return;
    const bool keep = mask == nullptr || mask[i];
    dlogprobs[i] = keep ? kl_gradient(logprobs[i], ref_logprobs[i], dk1[i], dk2[i], dk3[i]) : 0.0f;
}

// The last column whose mask is True, or -1; the same in every thread.
__device__ int find_last(const bool* mask, int row_length) {
    __shared__ int warp_last[THREADS / WARP];
    int last = -1;
    for (int t = threadIdx.x; t < row_length; t += THREADS)
        if (mask[t]) last = t;
    last = __reduce_max_sync(ALL_LANES, last);
    if (threadIdx.x % WARP == 0) warp_last[threadIdx.x / WARP] = last;
    __syncthreads();
    for (int warp = 0; warp < THREADS / WARP; ++warp) last = max(last, warp_last[warp]);
    return last;
}

__global__ void __launch_bounds__(THREADS)
    shape_rewards_kernel(const float* scores, const float* logprobs, const float* ref_logprobs,
                         const bool* mask, int row_length, float kl_coef, int estimator,
                         float* rewards, float* k1, float* k2, float* k3) {
    const int64_t start = static_cast<int64_t>(blockIdx.x) * row_length;
    const int last = find_last(mask + start, row_length);
    const float score = scores[blockIdx.x];
    for (int t = threadIdx.x; t < row_length; t += THREADS) {
        const int64_t i = start + t;
        const KLEstimates kl = mask[i] ? kl_estimates(logprobs[i], ref_logprobs[i]) : KLEstimates{};
        const float penalty = kl_coef * (estimator == 1 ? kl.k1 : estimator == 2 ? kl.k2 : kl.k3);
        rewards[i] = t == last ? score - penalty : -penalty;
        write(k1, i, kl.k1);
        write(k2, i, kl.k2);
        write(k3, i, kl.k3);
    }
}

unsigned num_blocks(int64_t numel) { return static_cast<unsigned>((numel + THREADS - 1) / THREADS); }

}  // namespace

const char* kl_estimate(const float* logprobs, const float* ref_logprobs, const bool* mask,
                        int64_t numel, float* k1, float* k2, float* k3, Launch launch) {
    if (numel == 0) return nullptr;
    cudaSetDevice(launch.device);
    kl_estimate_kernel<<<num_blocks(numel), THREADS, 0, static_cast<cudaStream_t>(launch.stream)>>>(
        logprobs, ref_logprobs, mask, numel, k1, k2, k3);
    return launch_error();
}

const char* kl_gradient(const float* logprobs, const float* ref_logprobs, const bool* mask,
                        const float* dk1, const float* dk2, const float* dk3, int64_t numel,
                        float* dlogprobs, Launch launch) {
    if (numel == 0) return nullptr;
    cudaSetDevice(launch.device);
    kl_gradient_kernel<<<num_blocks(numel), THREADS, 0, static_cast<cudaStream_t>(launch.stream)>>>(
        logprobs, ref_logprobs, mask, dk1, dk2, dk3, numel, dlogprobs);
    return launch_error();
}

const char* shape_rewards(const float* scores, const float* logprobs, const float* ref_logprobs,
                          const bool* mask, int64_t num_rows, int64_t row_length, float kl_coef,
                          int estimator, float* rewards, float* k1, float* k2, float* k3,
                          Launch launch) {
    if (num_rows == 0 || row_length == 0) return nullptr;
    cudaSetDevice(launch.device);
    shape_rewards_kernel<<<static_cast<unsigned>(num_rows), THREADS, 0,
                           static_cast<cudaStream_t>(launch.stream)>>>(
        scores, logprobs, ref_logprobs, mask, static_cast<int>(row_length), kl_coef, estimator,
        rewards, k1, k2, k3);
    return launch_error();
}

}  // namespace fastrl
