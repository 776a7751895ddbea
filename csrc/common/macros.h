// Inlining and unrolling for both compilers.
#pragma once

#ifdef __CUDACC__
#define SDP_HOST_DEVICE __host__ __device__ __forceinline__
#define SDP_UNROLL _Pragma("unroll")
#else
#define SDP_HOST_DEVICE inline __attribute__((always_inline))
#define SDP_UNROLL _Pragma("GCC unroll 32")
#endif
