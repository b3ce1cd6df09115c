// Arithmetic that a kernel and a CPU program share is marked FASTRL_HD.
#pragma once

#ifdef __CUDACC__
#define FASTRL_HD __host__ __device__ __forceinline__
#else
#define FASTRL_HD inline
#endif
