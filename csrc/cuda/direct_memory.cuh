// Reads that widen to sums and writes that narrow once, of the direct kernels.
#pragma once

#include "memory.cuh"
#include "ptx.cuh"

namespace deconv {
namespace cuda {
namespace direct {

// Elements of one access out of n.
template <class T, int n>
constexpr int kAccess = n * sizeof(T) <= 16 ? n : 16 / sizeof(T);

template <class Sum, class T>
__device__ __forceinline__ Sum to_sum(T value) {
  if constexpr (sizeof(T) == 2) {
    return widen(value);
  } else {
    return value;
  }
}

template <class Sum, class T>
__device__ __forceinline__ Sum read(const T* from) {
  return to_sum<Sum>(*from);
}

// From global memory that the kernel does not write.
template <class Sum, int n, class T>
__device__ __forceinline__ void read_vector(Sum (&to)[n], const T* from) {
#pragma unroll
  for (int i = 0; i < n; i += kAccess<T, n>) {
    const auto v = load_read_only(reinterpret_cast<const Vector<T, kAccess<T, n>>*>(from + i));
#pragma unroll
    for (int j = 0; j < kAccess<T, n>; ++j) to[i + j] = to_sum<Sum>(v.at[j]);
  }
}

template <class Sum, int n>
__device__ __forceinline__ void read_shared(Sum (&to)[n], const Sum* from) {
#pragma unroll
  for (int i = 0; i < n; i += kAccess<Sum, n>) {
    const auto v = load(reinterpret_cast<const Vector<Sum, kAccess<Sum, n>>*>(from + i));
#pragma unroll
    for (int j = 0; j < kAccess<Sum, n>; ++j) to[i + j] = v.at[j];
  }
}

template <class T, class Sum>
__device__ __forceinline__ void write(T* to, Sum value) {
  *to = convert<T>(value);
}

template <int n, class T, class Sum>
__device__ __forceinline__ void write_vector(T* to, const Sum* from) {
#pragma unroll
  for (int i = 0; i < n; i += kAccess<T, n>) {
    Vector<T, kAccess<T, n>> v;
#pragma unroll
    for (int j = 0; j < kAccess<T, n>; ++j) v.at[j] = convert<T>(from[i + j]);
    store(reinterpret_cast<Vector<T, kAccess<T, n>>*>(to + i), v);
  }
}

}  // namespace direct
}  // namespace cuda
}  // namespace deconv
