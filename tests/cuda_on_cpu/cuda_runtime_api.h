// Stands in for CUDA's header of this name where a C++ compiler takes csrc/cuda/*.cu: the words of
// CUDA C++ that the kernels use, each with its meaning on the CPU. See emulation.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "emulation.h"

#define DECONV_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static_assert(false, "shared memory is dynamic: shared_memory<T>()");

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

// Of the thread that runs; set whenever threads change. Without constructor they are constants to
// the compiler, so that reading them is no access to memory.
extern "C" const uint3 threadIdx, blockIdx, blockDim, gridDim;

using std::max;
using std::min;

// Barriers are told apart by their line: the compiler may make several calls of one.
__forceinline__ void __syncthreads(int line = __builtin_LINE()) { emulation::sync_block(line); }
__forceinline__ void __syncwarp(unsigned mask = ~0u) { emulation::sync_warp(mask); }

template <class T>
__forceinline__ T __ldg(const T* from) {
  T to;
  emulation::load(&to, from, sizeof(T));
  return to;
}

template <class T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int lane) {
  emulation::shuffle(mask, &value, sizeof(T), lane & 31);
  return value;
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int flipped) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ flipped);
}
// Lanes whose source lies outside the warp keep their own value.
template <class T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane + static_cast<int>(delta);
  return __shfl_sync(mask, value, from < 32 ? from : lane);
}
template <class T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane - static_cast<int>(delta);
  return __shfl_sync(mask, value, from >= 0 ? from : lane);
}
__forceinline__ unsigned __ballot_sync(unsigned mask, bool predicate) {
  return emulation::ballot(mask, predicate);
}
__forceinline__ bool __any_sync(unsigned mask, bool predicate) {
  return emulation::ballot(mask, predicate) != 0;
}
__forceinline__ bool __all_sync(unsigned mask, bool predicate) {
  return emulation::ballot(mask, predicate) == ~0u;
}

// ---- the runtime's host functions ---------------------------------------------------------------

using cudaStream_t = void*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return emulation::attribute(value, attribute) ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  emulation::fill(to, value, bytes);
  return cudaSuccess;
}
