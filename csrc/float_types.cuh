// The floating types that kernels read: to float32 and back, and how many fit a load of 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fastrl {

template <typename T>
constexpr int PACK = 16 / sizeof(T);

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow(float value, float& result) { result = value; }
__device__ __forceinline__ void narrow(float value, __half& result) {
    result = __float2half_rn(value);
}
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& result) {
    result = __float2bfloat16_rn(value);
}

}  // namespace fastrl
