// Instructions of sm_90a alone, as ptx.cuh has the others: mbarriers, copies by the copy engine,
// and products of a warpgroup. On the CPU tests/cuda_on_cpu/asynchronous.cpp takes their place.
//
// Titles in quotes are sections of the PTX ISA.
//
// Order ("Async Proxy", "wgmma.fence"). Products read shared memory, and the copy engine writes it,
// through a proxy of their own. What threads have written (cp.async writes for its thread) is seen
// by products after
//
//     write or copy_async_wait;  fence_async_proxy;  a barrier;  product
//
// What the copy engine has written is seen by who has waited for its mbarrier. Sums of products may
// be touched after wgmma_wait, and products may follow that use sums after wgmma_fence.
#pragma once

#include "ptx.cuh"

// Whether this pass of the compiler has these instructions; elsewhere kernels have no body.
#if defined(DECONV_CUDA_ON_CPU) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DECONV_SM90A 1
#else
#define DECONV_SM90A 0
#endif

namespace deconv {
namespace cuda {

constexpr int kWarpgroup = 128;  // threads, the first a multiple of 128

// ---- mbarriers ----------------------------------------------------------------------------------

// "mbarrier.init". The phase that it is in ends after `arrivals`; then the next begins. Others may
// use it after fence_async_proxy, for the copy engine, and __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint64_t* s_barrier, int arrivals) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mbarrier_init(s_barrier, arrivals);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(s_barrier)),
               "r"(arrivals)
               : "memory");
#endif
}

// "mbarrier.arrive": what this thread did before is seen by who waits for the phase.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* s_barrier) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mbarrier_arrive(s_barrier, 0);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(s_barrier))
               : "memory");
#endif
}

// The same, and the phase ends not before copy_bulk has written so many bytes.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* s_barrier, int bytes) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mbarrier_arrive(s_barrier, bytes);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(s_barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// "mbarrier.try_wait": waits for the end of the phase of that parity, be it the present one or the
// last; the first phase has parity 0. So a wait for parity 1 of a fresh barrier returns at once.
__device__ __forceinline__ void mbarrier_wait(uint64_t* s_barrier, unsigned parity) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::mbarrier_wait(s_barrier, parity);
#else
  const uint32_t address = shared_address(s_barrier);
  uint32_t over;
  do {
    asm volatile(
        "{\n.reg .pred over;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 over, [%1], %2;\n"
        "selp.u32 %0, 1, 0, over;\n}"
        : "=r"(over)
        : "r"(address), "r"(parity)
        : "memory");
  } while (!over);
#endif
}

// "fence.proxy.async": see above.
__device__ __forceinline__ void fence_async_proxy() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::fence_async_proxy();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- the copy engine ----------------------------------------------------------------------------

// "cp.async.bulk": neighbouring bytes, a multiple of 16 as both addresses are, by one thread.
__device__ __forceinline__ void copy_bulk(void* s_to, const void* from, int bytes,
                                          uint64_t* s_barrier) {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::copy_bulk(s_to, from, bytes, s_barrier);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(s_to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(s_barrier))
      : "memory");
#endif
}

// ---- registers ----------------------------------------------------------------------------------

// "setmaxnreg": this warpgroup gives registers back, or waits for more, `kRegisters` a thread.
template <int kRegisters>
__device__ __forceinline__ void fewer_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "see the manual");
#if !defined(DECONV_CUDA_ON_CPU)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void more_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "see the manual");
#if !defined(DECONV_CUDA_ON_CPU)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// ---- products of a warpgroup --------------------------------------------------------------------

// "Matrix Descriptor Format", of a matrix in shared memory without swizzle ("Shared Memory Matrix
// Layout", "Strides"). 8 vectors of 16 bytes are neighbours, a core matrix: K-major, 8 rows of 8
// elements of K; MN-major (transposed), 8 elements of K of 8 rows.
//
//     bits  0 - 13   address
//          16 - 29   leading dimension offset: from the first core matrix along K to the second
//          32 - 45   stride dimension offset: from 8 rows to the next 8
//          49 - 51   0, base offset, of swizzled matrices
//          62 - 63   0, no swizzle
//
// all three in units of 16 bytes.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* s_matrix, int leading,
                                                      int stride) {
#if defined(DECONV_CUDA_ON_CPU)
  const uint32_t address = emulation::shared_address(s_matrix);
#else
  const uint32_t address = shared_address(s_matrix);
#endif
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(leading) << 16 |
         static_cast<uint64_t>(stride) << 32;
}

// Of the matrix that lies 16 n bytes further on.
__device__ __forceinline__ uint64_t move_matrix(uint64_t descriptor, int n) {
  const uint32_t low = static_cast<uint32_t>(descriptor) + static_cast<uint32_t>(n);
  return (descriptor & ~uint64_t{0xffffffff}) | low;
}

// "wgmma.fence", "wgmma.commit_group", "wgmma.wait_group"; by all threads of the warpgroup.
__device__ __forceinline__ void wgmma_fence() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::wgmma_fence();
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
// Until all but the last kGroups groups are done.
template <int kGroups>
__device__ __forceinline__ void wgmma_wait() {
#if defined(DECONV_CUDA_ON_CPU)
  emulation::wgmma_wait(kGroups);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
#endif
}

// Keeps the compiler from moving what is done with sums across this place: it does not know that
// products are asynchronous.
template <int n>
__device__ __forceinline__ void wgmma_pin(float (&sums)[n]) {
#if !defined(DECONV_CUDA_ON_CPU)
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(sums[i])::"memory");
#endif
}

// The operands %0 .. %127 of the sums.
#define DECONV_4(f, i) f(i), f(i + 1), f(i + 2), f(i + 3)
#define DECONV_16(f, i) DECONV_4(f, i), DECONV_4(f, i + 4), DECONV_4(f, i + 8), DECONV_4(f, i + 12)
#define DECONV_32(f, i) DECONV_16(f, i), DECONV_16(f, i + 16)
#define DECONV_64(f, i) DECONV_32(f, i), DECONV_32(f, i + 32)
#define DECONV_128(f, i) DECONV_64(f, i), DECONV_64(f, i + 64)
#define DECONV_SUM(i) "+f"(sums[i])
#define DECONV_T10(t)                                                                    \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t \
  "8, "                                                                                  \
  "%" #t "9, "
#define DECONV_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " DECONV_T10(1) DECONV_T10(2) "%30, %31"
#define DECONV_NAMES_64                                                      \
  DECONV_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, " DECONV_T10(4) \
      DECONV_T10(5) "%60, %61, %62, %63"
#define DECONV_NAMES_128                                                                       \
  DECONV_NAMES_64 ", %64, %65, %66, %67, %68, %69, " DECONV_T10(7) DECONV_T10(8) DECONV_T10(9) \
      DECONV_T10(10) DECONV_T10(11) "%120, %121, %122, %123, %124, %125, %126, %127"
// The last operands: scale-d 1 (sums are kept), A and B not negated, and whether transposed.
#define DECONV_WGMMA(columns, type, names, a, b, t, sums)                                      \
  asm volatile(                                                                                \
      "{\n.reg .pred keep;\nsetp.eq.u32 keep, 0, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" names "}, " a \
      ", " b ", keep, 1, 1, " t ", " t ";\n}"                                                  \
      : sums                                                                                   \
      : "l"(matrix_a), "l"(matrix_b), "n"(kTransposed))

// sums += A B, "wgmma.mma_async": A 64 x 16 and B 16 x columns by descriptors, T is Float16 or
// BFloat16; K-major both, or MN-major if kTransposed. Thread 32 w + 4 g + t has of the sums, in
// float32 ("Register Fragments"),
//
//     sums[i] = D[16 w + g + 8 (i / 2 % 2)][8 (i / 4) + 2 t + i % 2]       i = 0 .. columns / 2
template <class T, int kTransposed = 0, int kSums>
__device__ __forceinline__ void wgmma(float (&sums)[kSums], uint64_t matrix_a, uint64_t matrix_b) {
  static_assert(kSums == 32 || kSums == 64 || kSums == 128, "columns: 64, 128 or 256");
#if defined(DECONV_CUDA_ON_CPU)
  emulation::wgmma<T>(sums, 2 * kSums, matrix_a, matrix_b, kTransposed);
#else
  constexpr bool kHalf = std::is_same<T, Float16>::value;
  static_assert(kHalf || std::is_same<T, BFloat16>::value, "16-bit floats");
  if constexpr (kSums == 32 && kHalf)
    DECONV_WGMMA(64, "f16", DECONV_NAMES_32, "%32", "%33", "%34", DECONV_32(DECONV_SUM, 0));
  else if constexpr (kSums == 32)
    DECONV_WGMMA(64, "bf16", DECONV_NAMES_32, "%32", "%33", "%34", DECONV_32(DECONV_SUM, 0));
  else if constexpr (kSums == 64 && kHalf)
    DECONV_WGMMA(128, "f16", DECONV_NAMES_64, "%64", "%65", "%66", DECONV_64(DECONV_SUM, 0));
  else if constexpr (kSums == 64)
    DECONV_WGMMA(128, "bf16", DECONV_NAMES_64, "%64", "%65", "%66", DECONV_64(DECONV_SUM, 0));
  else if constexpr (kHalf)
    DECONV_WGMMA(256, "f16", DECONV_NAMES_128, "%128", "%129", "%130", DECONV_128(DECONV_SUM, 0));
  else
    DECONV_WGMMA(256, "bf16", DECONV_NAMES_128, "%128", "%129", "%130", DECONV_128(DECONV_SUM, 0));
#endif
}

#undef DECONV_4
#undef DECONV_16
#undef DECONV_32
#undef DECONV_64
#undef DECONV_128
#undef DECONV_SUM
#undef DECONV_T10
#undef DECONV_NAMES_32
#undef DECONV_NAMES_64
#undef DECONV_NAMES_128
#undef DECONV_WGMMA

}  // namespace cuda
}  // namespace deconv
