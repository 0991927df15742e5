// The weights in the order in which gather_kernel copies them:
//
//     [group][tap h][tap w][vector of channels][row, padded][v]   v * sizeof(T) = 16 bytes
//
// zero beyond the last channel and row. A thread makes one vector; neighbours have neighbouring
// taps of the same channels, which is how they lie in a contiguous weight.
//
// Bytes moved: the weight once, its packed copy written once: about 2 |w| / 4 TB/s on an H200 plus
// a launch; 8 us for 1024 -> 512 channels, 4x4, in 16 bits, about 2 us below 100 KB.
#pragma once

#include <cuda_runtime_api.h>

#include "gemm_plan.h"
#include "memory.cuh"

namespace deconv {
namespace cuda {

constexpr int kPackThreads = 256;

struct PackPlan {
  const void* weight;
  void* packed;
  int64_t w_group, w_channel, w_row, w_h, w_w;
  int64_t count;  // vectors
  int32_t channels, rows, rows_padded, vectors, taps_h, taps_w;
  int32_t run;  // rows_across: a thread owns so many neighbouring rows of 4 * run; else 0
  int16_t k_h[kMaxTaps], k_w[kMaxTaps];
};

// gather_kernel computes row `position` of the packed order into accumulator e of lane t where
// position = strip * 16 + e / 2 * 8 + 2 t + e % 2 within a warp; the run of lane t are the rows t *
// run and on.
__device__ inline int row_of_position(int position, int run) {
  if (run == 0) return position;
  const int warp = position / (4 * run) * (4 * run), within = position - warp;
  const int lane = within % 8 / 2, i = within / 8 * 2 + within % 2;
  return warp + lane * run + i;
}

template <class T>
__global__ __launch_bounds__(kPackThreads) void pack_kernel(const __grid_constant__ PackPlan p) {
  constexpr int kV = kVectorBytes / sizeof(T);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kPackThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPackThreads + threadIdx.x; i < p.count;
       i += stride) {
    const int taps = p.taps_h * p.taps_w;
    const int tap = static_cast<int>(i % taps), tap_w = tap % p.taps_w, tap_h = tap / p.taps_w;
    int64_t rest = i / taps;
    const int position = static_cast<int>(rest % p.rows_padded);
    rest /= p.rows_padded;
    const int vector = static_cast<int>(rest % p.vectors),
              group = static_cast<int>(rest / p.vectors);
    const int row = row_of_position(position, p.run);
    const T* from = static_cast<const T*>(p.weight) + group * p.w_group + row * p.w_row +
                    vector * kV * p.w_channel + p.k_h[tap_h] * p.w_h + p.k_w[tap_w] * p.w_w;
    Vector<T, kV> values;
#pragma unroll
    for (int c = 0; c < kV; ++c)
      values.at[c] = row < p.rows && vector * kV + c < p.channels ? from[c * p.w_channel] : T{};
    T* to = static_cast<T*>(p.packed) +
            (((static_cast<int64_t>(group) * taps + tap) * p.vectors + vector) * p.rows_padded +
             position) *
                kV;
    store(reinterpret_cast<Vector<T, kV>*>(to), values);
  }
}

}  // namespace cuda
}  // namespace deconv
