// sm_90a: kernels that copy x to y, 128 floats by one block of a warpgroup, through mbarriers and
// the copy engine; and products of a warpgroup, y = x w with x [64, 16], w [16, columns]. Each with
// a mistake and without.
#include "../../../csrc/cuda/ptx_sm90a.cuh"
#include "planted.h"

namespace planted {
namespace {

using namespace deconv;
using namespace deconv::cuda;

constexpr int kBytes = 128 * sizeof(float);

struct Arguments {
  const float* x;
  float* y;
};

enum CopyMistake {
  kCopyRight,
  kNoWait,
  kWrongParity,
  kTooManyBytes,
  kTooManyArrivals,
  kArrivesTwice,
  kNoBarrierAfterInit,
  kNoFenceAfterInit,
  kMisaligned,
  kNotAwaited,
};

// The copy engine brings x, everybody waits for it.
template <CopyMistake kMistake>
__global__ void bulk(Arguments a) {
  float* s = shared_memory<float>();
  uint64_t* s_barrier = shared_memory<uint64_t>(kBytes);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) {
    mbarrier_init(s_barrier, kMistake == kTooManyArrivals ? 2 : 1);
    if (kMistake != kNoFenceAfterInit) fence_async_proxy();
  }
  if (kMistake != kNoBarrierAfterInit) __syncthreads();
  if (t == 0) {
    mbarrier_arrive_expect(s_barrier, kBytes + (kMistake == kTooManyBytes ? 16 : 0));
    copy_bulk(s, a.x + (kMistake == kMisaligned ? 1 : 0), kBytes, s_barrier);
    if (kMistake == kArrivesTwice) mbarrier_arrive(s_barrier);
  }
  if (kMistake == kNotAwaited) {
    a.y[t] = a.x[t];
    return;
  }
  if (kMistake != kNoWait) mbarrier_wait(s_barrier, kMistake == kWrongParity ? 1 : 0);
  a.y[t] = s[t];
}

enum RingMistake { kRingRight, kNoEmptyWait, kEmptyTooEarly, kNoWarpBarrier };

// Warp 0 writes four slices of x, one after the other into one buffer, warp 1 takes them out.
template <RingMistake kMistake>
__global__ void ring(Arguments a) {
  float* s = shared_memory<float>();
  uint64_t* s_full = shared_memory<uint64_t>(kBytes);
  uint64_t* s_empty = s_full + 1;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  if (t == 0) {
    mbarrier_init(s_full, 1);
    mbarrier_init(s_empty, 1);
  }
  __syncthreads();
  for (int i = 0; i < 4; ++i) {
    if (warp == 0) {
      if (kMistake != kNoEmptyWait) mbarrier_wait(s_empty, i % 2 ^ 1);
      s[lane] = a.x[i * 32 + lane];
      if (kMistake != kNoWarpBarrier) __syncwarp();
      if (lane == 0) mbarrier_arrive(s_full);
    } else if (warp == 1) {
      mbarrier_wait(s_full, i % 2);
      if (kMistake == kEmptyTooEarly && lane == 0) mbarrier_arrive(s_empty);
      a.y[i * 32 + lane] = s[lane ^ 1];
      __syncwarp();
      if (kMistake != kEmptyTooEarly && lane == 0) mbarrier_arrive(s_empty);
    }
  }
}

enum ProductMistake {
  kRight,
  kNoProxyFence,
  kNoBarrier,
  kNoFence,
  kEarlyRead,
  kWaitsForTooFew,
  kNeverAwaited,
  kOverwritten,
  kOverwrittenByOthers,
  kDivergent,
  kOutOfBounds,
  kEarlyProduct,
  kOffsetsExchanged,
  kTransposedOffsetsExchanged,
};

struct ProductArguments {
  const void* x;
  const void* w;
  float* y;
};

// from[index * stride + k * stride_k] as s[k / 8][index][8], or transposed s[index / 8][k][8].
template <class T, bool kTransposed = false>
__device__ void stage(T* s, const T* from, int count, int stride, int stride_k) {
  for (int i = static_cast<int>(threadIdx.x); i < count * 16; i += kWarpgroup) {
    const int index = i / 16, k = i % 16;
    const int at =
        kTransposed ? (index / 8 * 16 + k) * 8 + index % 8 : (k / 8 * count + index) * 8 + k % 8;
    s[at] = from[index * stride + k * stride_k];
  }
}

// y[64][2 * kSums]
template <int kSums>
__device__ void store_sums(float* y, const float (&sums)[kSums]) {
  const int t = static_cast<int>(threadIdx.x);
  for (int i = 0; i < kSums; ++i) {
    const int row = t / 32 * 16 + t % 32 / 4 + i / 2 % 2 * 8,
              column = i / 4 * 8 + t % 4 * 2 + i % 2;
    y[row * 2 * kSums + column] = sums[i];
  }
}

template <class T, int kColumns, ProductMistake kMistake>
__global__ void transposed_product(ProductArguments a) {
  T* s_a = shared_memory<T>();
  T* s_b = s_a + 64 * 16;
  stage<T, true>(s_a, static_cast<const T*>(a.x), 64, 16, 1);
  stage<T, true>(s_b, static_cast<const T*>(a.w), kColumns, 1, kColumns);
  fence_async_proxy();
  __syncthreads();
  float sums[kColumns / 2];
  for (float& sum : sums) sum = 0;
  wgmma_fence();
  // To the other half of K it is 8 vectors, to the next 8 rows 16.
  constexpr bool kExchanged = kMistake == kTransposedOffsetsExchanged;
  wgmma<T, 1>(sums, matrix_descriptor(s_a, 8, 16),
              kExchanged ? matrix_descriptor(s_b, 16, 8) : matrix_descriptor(s_b, 8, 16));
  wgmma_commit();
  wgmma_wait<0>();
  store_sums(a.y, sums);
}

template <class T, int kColumns, ProductMistake kMistake>
__global__ void product(ProductArguments a) {
  T* s_a = shared_memory<T>();
  T* s_b = s_a + 64 * 16;
  stage(s_a, static_cast<const T*>(a.x), 64, 16, 1);
  stage(s_b, static_cast<const T*>(a.w), kColumns, 1, kColumns);
  const int t = static_cast<int>(threadIdx.x);
  if (kMistake != kNoProxyFence) fence_async_proxy();
  if (kMistake != kNoBarrier) __syncthreads();
  float sums[kColumns / 2];
  for (float& sum : sums) sum = 0;
  const int shift = kMistake == kOutOfBounds ? 1 : 0;
  const uint64_t descriptor_a = matrix_descriptor(s_a, 64, 8),
                 descriptor_b = kMistake == kOffsetsExchanged
                                    ? matrix_descriptor(s_b, 8, kColumns)
                                    : matrix_descriptor(s_b, kColumns, 8) + shift;
  if (kMistake != kNoFence) wgmma_fence();
  if (kMistake != kDivergent || t < 96) wgmma<T>(sums, descriptor_a, descriptor_b);
  wgmma_commit();
  if (kMistake == kOverwritten) s_b[t] = s_a[t];
  if (kMistake == kEarlyRead) a.y[t] = sums[1];
  if (kMistake == kWaitsForTooFew)
    wgmma_wait<1>();
  else if (kMistake != kNeverAwaited)
    wgmma_wait<0>();
  if (kMistake == kOverwrittenByOthers && t >= 96) s_b[t] = T{};
  if (kMistake == kNeverAwaited) return;
  store_sums(a.y, sums);
}

// The copy engine brings A; the product may not begin before.
template <ProductMistake kMistake>
__global__ void product_of_copy(ProductArguments a) {
  using T = Float16;
  T* s_a = shared_memory<T>();
  T* s_b = s_a + 64 * 16;
  uint64_t* s_barrier = shared_memory<uint64_t>((64 + 64) * 32);
  const int t = static_cast<int>(threadIdx.x);
  if (t == 0) mbarrier_init(s_barrier, 1);
  stage(s_b, static_cast<const T*>(a.w), 64, 1, 64);
  fence_async_proxy();
  __syncthreads();
  if (t == 0) {
    mbarrier_arrive_expect(s_barrier, 64 * 32);
    copy_bulk(s_a, a.x, 64 * 32, s_barrier);
  }
  if (kMistake != kEarlyProduct) mbarrier_wait(s_barrier, 0);
  float sums[32];
  for (float& sum : sums) sum = 0;
  wgmma_fence();
  wgmma<T>(sums, matrix_descriptor(s_a, 64, 8), matrix_descriptor(s_b, 64, 8));
  wgmma_commit();
  wgmma_wait<0>();
  store_sums(a.y, sums);
}

template <void (*kernel)(Arguments)>
void run(const Params& p) {
  launch(kernel, dim3(1), dim3(128), kBytes + 16, nullptr,
         Arguments{static_cast<const float*>(p.x.data), static_cast<float*>(p.y.data)}, "planted");
}

template <void (*kernel)(ProductArguments), int kColumns>
void run(const Params& p) {
  launch(kernel, dim3(1), dim3(128), (64 + kColumns) * 32 + 8, nullptr,
         ProductArguments{p.x.data, p.w.data, static_cast<float*>(p.y.data)}, "planted");
}

}  // namespace

const Kernels kAsynchronous = {
    {"bulk_right", run<bulk<kCopyRight>>},
    {"bulk_not_waited_for", run<bulk<kNoWait>>},
    {"bulk_wrong_parity", run<bulk<kWrongParity>>},
    {"bulk_too_many_bytes_expected", run<bulk<kTooManyBytes>>},
    {"bulk_too_many_arrivals_expected", run<bulk<kTooManyArrivals>>},
    {"bulk_arrives_twice", run<bulk<kArrivesTwice>>},
    {"bulk_no_barrier_after_init", run<bulk<kNoBarrierAfterInit>>},
    {"bulk_no_fence_after_init", run<bulk<kNoFenceAfterInit>>},
    {"bulk_misaligned", run<bulk<kMisaligned>>},
    {"bulk_not_awaited", run<bulk<kNotAwaited>>},
    {"ring_right", run<ring<kRingRight>>},
    {"ring_never_empty", run<ring<kNoEmptyWait>>},
    {"ring_empty_too_early", run<ring<kEmptyTooEarly>>},
    {"ring_without_warp_barrier", run<ring<kNoWarpBarrier>>},
    {"product_float16_64", run<product<Float16, 64, kRight>, 64>},
    {"product_float16_128", run<product<Float16, 128, kRight>, 128>},
    {"product_float16_256", run<product<Float16, 256, kRight>, 256>},
    {"product_transposed_64", run<transposed_product<Float16, 64, kRight>, 64>},
    {"product_transposed_256", run<transposed_product<Float16, 256, kRight>, 256>},
    {"product_transposed_wrong_64",
     run<transposed_product<Float16, 64, kTransposedOffsetsExchanged>, 64>},
    {"product_bfloat16_64", run<product<BFloat16, 64, kRight>, 64>},
    {"product_bfloat16_256", run<product<BFloat16, 256, kRight>, 256>},
    {"product_of_copy", run<product_of_copy<kRight>, 64>},
    {"product_no_proxy_fence", run<product<Float16, 64, kNoProxyFence>, 64>},
    {"product_no_barrier", run<product<Float16, 64, kNoBarrier>, 64>},
    {"product_no_fence", run<product<Float16, 64, kNoFence>, 64>},
    {"product_early_read", run<product<Float16, 64, kEarlyRead>, 64>},
    {"product_waits_for_too_few", run<product<Float16, 64, kWaitsForTooFew>, 64>},
    {"product_never_awaited", run<product<Float16, 64, kNeverAwaited>, 64>},
    {"product_overwritten", run<product<Float16, 64, kOverwritten>, 64>},
    {"product_overwritten_by_others", run<product<Float16, 64, kOverwrittenByOthers>, 64>},
    {"product_divergent", run<product<Float16, 64, kDivergent>, 64>},
    {"product_out_of_bounds", run<product<Float16, 256, kOutOfBounds>, 256>},
    {"product_of_copy_early", run<product_of_copy<kEarlyProduct>, 64>},
    {"product_offsets_exchanged", run<product<Float16, 64, kOffsetsExchanged>, 64>},
};

}  // namespace planted
