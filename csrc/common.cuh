// Loads of several neighbours, and what every launcher needs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastrl {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T items[N];
};

template <typename T, int N>
__device__ __forceinline__ bool fits(const T* source, int64_t left) {
    return left >= N && reinterpret_cast<uintptr_t>(source) % (sizeof(T) * N) == 0;
}

// N neighbours in one load where the address allows it; `fill` beyond the `left` that exist.
template <int N, typename T>
__device__ __forceinline__ void load_pack(const T* source, int64_t left, T fill, T (&items)[N]) {
    if (fits<T, N>(source, left)) {
        const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(source);
#pragma unroll
        for (int i = 0; i < N; ++i) items[i] = pack.items[i];
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) items[i] = i < left ? source[i] : fill;
    }
}

template <int N, typename T>
__device__ __forceinline__ void store_pack(T* target, int64_t left, const T (&items)[N]) {
    if (fits<T, N>(target, left)) {
        Pack<T, N> pack;
#pragma unroll
        for (int i = 0; i < N; ++i) pack.items[i] = items[i];
        *reinterpret_cast<Pack<T, N>*>(target) = pack;
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (i < left) target[i] = items[i];
    }
}

// Null, or why the launch that came just before failed.
inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastrl
