// Memory as the kernels see it: a block's dynamic shared memory, and accesses of a whole vector.
//
//     load(p)             global or shared memory
//     load_read_only(p)   global memory that no thread writes during the kernel
//     load_streaming(p)   the same, read once: first to leave the caches
//     store(p, v)         global or shared memory
//     store_streaming     global memory that this kernel does not read again
//
// V is any plain type of 2, 4, 8 or 16 bytes, Vector<T, n> for example; p has to be a multiple of
// its size. Single elements may be read and written through plain pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>

#include "../half.h"

namespace deconv {
namespace cuda {

template <class T, int n>
struct alignas(n * sizeof(T)) Vector {
  T at[n];
};

// The block's dynamic shared memory, at its 128-byte aligned begin, `bytes` in.
template <class T>
__device__ __forceinline__ T* shared_memory(size_t bytes = 0) {
#if defined(DECONV_CUDA_ON_CPU)
  return reinterpret_cast<T*>(static_cast<char*>(emulation::shared_memory()) + bytes);
#else
  extern __shared__ __align__(128) unsigned char s_dynamic[];
  return reinterpret_cast<T*>(s_dynamic + bytes);
#endif
}

#if !defined(DECONV_CUDA_ON_CPU)
// CUDA's built-in type of as many bytes.
template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class V>
using WordOf = typename Word<sizeof(V)>::type;
#endif

template <class V>
__device__ __forceinline__ V load(const V* from) {
#if defined(DECONV_CUDA_ON_CPU)
  V to;
  emulation::load(&to, from, sizeof(V));
  return to;
#else
  return bit_cast<V>(*reinterpret_cast<const WordOf<V>*>(from));
#endif
}

template <class V>
__device__ __forceinline__ V load_read_only(const V* from) {
#if defined(DECONV_CUDA_ON_CPU)
  return load(from);
#else
  return bit_cast<V>(__ldg(reinterpret_cast<const WordOf<V>*>(from)));
#endif
}

template <class V>
__device__ __forceinline__ V load_streaming(const V* from) {
#if defined(DECONV_CUDA_ON_CPU)
  return load(from);
#else
  return bit_cast<V>(__ldcs(reinterpret_cast<const WordOf<V>*>(from)));
#endif
}

template <class V>
__device__ __forceinline__ void store(V* to, const V& value) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::store(to, &value, sizeof(V));
#else
  *reinterpret_cast<WordOf<V>*>(to) = bit_cast<WordOf<V> >(value);
#endif
}

template <class V>
__device__ __forceinline__ void store_streaming(V* to, const V& value) {
#if defined(DECONV_CUDA_ON_CPU)
  store(to, value);
#else
  __stcs(reinterpret_cast<WordOf<V>*>(to), bit_cast<WordOf<V> >(value));
#endif
}

}  // namespace cuda
}  // namespace deconv
