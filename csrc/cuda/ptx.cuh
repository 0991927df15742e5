// Instructions that CUDA C++ has no word for, one function each; the only inline assembly there is.
// On the CPU (tests/cuda_on_cpu) a function of the same meaning takes its place.
//
// Fragments are those of the PTX ISA, "Warp-level matrix instructions". With g = lane / 4 and
// t = lane % 4, 16-bit elements packed lower column (row, for B) first:
//
//     mma 16x8x16, 16 bits   a[0] A[g][2t..]      a[1] A[g+8][2t..]   a[2] A[g][2t+8..]
//                            a[3] A[g+8][2t+8..]  b[0] B[2t..][g]     b[1] B[2t+8..][g]
//     mma 16x8x8, TF32       a[0] A[g][t]         a[1] A[g+8][t]      a[2] A[g][t+4]
//                            a[3] A[g+8][t+4]     b[0] B[t][g]        b[1] B[t+4][g]
//     both                   c[0..1] C[g][2t..2t+1]                   c[2..3] C[g+8][2t..2t+1]
//     mma 8x8x4, float64     a A[g][t]            b B[t][g]           c[0..1] C[g][2t..2t+1]
//
// All 32 lanes of a warp call ldmatrix and mma together.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <type_traits>

#include "../half.h"

namespace deconv {
namespace cuda {

#if !defined(DECONV_CUDA_ON_CPU)
// A pointer into shared memory as its 32-bit address there.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}
#endif

// ---- asynchronous copies from global to shared memory (cp.async) --------------------------------

// Copies the first `valid_bytes` (0 .. kBytes) and fills the rest of kBytes (4, 8, 16) with zeros;
// both addresses are multiples of kBytes. With 0 nothing is read, but `from` should point into the
// tensor. Seen by this thread after copy_async_wait, by the others after a barrier that follows it.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* s_to, const void* from, int valid_bytes = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "sizes of cp.async");
#if defined(DECONV_CUDA_ON_CPU)
  emulation::copy_async(s_to, from, kBytes, valid_bytes);
#else
  if constexpr (kBytes == 16) {  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(s_to)),
                 "l"(__cvta_generic_to_global(from)), "r"(valid_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(s_to)),
                 "l"(__cvta_generic_to_global(from)), "n"(kBytes), "r"(valid_bytes)
                 : "memory");
  }
#endif
}

// Closes the group of this thread's copies since the last commit; a group may be empty.
__device__ __forceinline__ void copy_async_commit() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all but the last kGroups groups of this thread have arrived.
template <int kGroups>
__device__ __forceinline__ void copy_async_wait() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::copy_async_wait(kGroups);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}

// ---- fragments from shared memory (ldmatrix) ----------------------------------------------------

// Loads 1, 2 or 4 matrices of 8 rows of 16 bytes. Lane i gives the address of row i % 8 of matrix
// i / 8 (lanes beyond 8 * kMatrices: any valid address). In r[m] lane i receives 16-bit elements
// 2 (i % 4) and 2 (i % 4) + 1 of row i / 4 of matrix m; transposed, of column i / 4.
template <int kMatrices, bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[kMatrices], const void* s_row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "sizes of ldmatrix");
#if defined(DECONV_CUDA_ON_CPU)
  emulation::ldmatrix(r, s_row, kMatrices, kTransposed);
#else
  const uint32_t address = shared_address(s_row);
  if constexpr (kMatrices == 1 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2 && !kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// ---- products of fragments (mma.sync), c += a * b -----------------------------------------------

// T is Float16 or BFloat16; sums in float32.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mma_16x8x16<T>(c, a, b);
#else
  if constexpr (std::is_same<T, Float16>::value) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same<T, BFloat16>::value, "16-bit floats");
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// Operands as to_tf32 makes them.
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                const uint32_t (&b)[2]) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mma_16x8x8_tf32(c, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

__device__ __forceinline__ void mma_8x8x4(double (&c)[2], double a, double b) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mma_8x8x4(c, a, b);
#else
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(c[0]), "+d"(c[1])
               : "d"(a), "d"(b));
#endif
}

// ---- conversions --------------------------------------------------------------------------------

// Rounded to TF32's 10 mantissa bits, to nearest, ties away from zero; as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#if defined(DECONV_CUDA_ON_CPU)
  const uint32_t bits = bit_cast<uint32_t>(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & ~0x1fffu : value != value ? 0x7fffffffu : bits;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// Two floats rounded to nearest even, `low` in the lower half; T is Float16 or BFloat16.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#if defined(DECONV_CUDA_ON_CPU)
  return convert<T>(low).bits | static_cast<uint32_t>(convert<T>(high).bits) << 16;
#else
  uint32_t packed;
  if constexpr (std::is_same<T, Float16>::value)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#endif
}

// One float16 widened, exactly.
__device__ __forceinline__ float widen(Float16 value) {
#if defined(DECONV_CUDA_ON_CPU)
  return to_float(value);
#else
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
#endif
}
__device__ __forceinline__ float widen(BFloat16 value) { return to_float(value); }

}  // namespace cuda
}  // namespace deconv
