// The end of gather_kernel: sums in registers -> bias, activation, rounding, target.
//
// A thread's outputs are two neighbouring positions times kPhases column phases of one row, 2 *
// kPhases neighbours in an NCHW target; or, rows_across, runs of kRun rows of one position
// (gemm_pack.cuh puts the rows in that order), neighbours in a channels_last target. Runs that are
// whole, contiguous and aligned are written as vectors, others element by element; no output is
// written twice.
#pragma once

#include "activate.cuh"
#include "gemm_gather.cuh"

namespace deconv {
namespace cuda {

// Bias and activation of all sums of a thread, and no bias left to add after that. The bias of
// sums[phase][m][n][e] is bias[bias_at(m, n, e)].
template <class Sum, int kPhases, int kA, int kB, int kBiases, class BiasAt>
__device__ __forceinline__ void activate_sums(const Params& p,
                                              Sum (&sums)[kPhases][kA][kB][kAccumulators],
                                              Sum (&bias)[kBiases], const BiasAt& bias_at) {
#pragma unroll
  for (int i = 0; i < kPhases * kA * kB * kAccumulators; ++i) {
    const int e = i % kAccumulators, n = i / kAccumulators % kB, m = i / kAccumulators / kB % kA;
    sums[i / kAccumulators / kB / kA][m][n][e] += bias[bias_at(m, n, e)];
  }
  activate_all<kPhases * kA * kB * kAccumulators>(p.activation, p.negative_slope,
                                                  &sums[0][0][0][0]);
#pragma unroll
  for (int i = 0; i < kBiases; ++i) bias[i] = 0;
}

// kCount values, rounded once.
template <class T, int kCount, class Sum>
__device__ __forceinline__ Vector<T, kCount> round_all(const Sum* values) {
  Vector<T, kCount> to;
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = pack<T>(values[i], values[i + 1]);
      to.at[i].bits = static_cast<uint16_t>(pair);
      to.at[i + 1].bits = static_cast<uint16_t>(pair >> 16);
    } else {
      to.at[i] = values[i];
      to.at[i + 1] = values[i + 1];
    }
  }
  return to;
}

// The first `count` of kCount values, `stride` elements apart.
template <int kCount, class T, class Sum>
__device__ __forceinline__ void write_run(T* to, const Sum (&values)[kCount], int count,
                                          int64_t stride) {
  constexpr int kPer = kCount * sizeof(T) < 16 ? kCount : 16 / sizeof(T);
  if (count >= kCount && stride == 1 && reinterpret_cast<uintptr_t>(to) % (kPer * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < kCount; i += kPer)
      store(reinterpret_cast<Vector<T, kPer>*>(to + i), round_all<T, kPer>(values + i));
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) to[i * stride] = convert<T>(values[i]);
  }
}

// A zero that stands for padding and an infinity make a NaN that the definition does not have: the
// thread computes what came out as NaN again, from the definition. Rare, so not inlined.
template <class T, class Sum>
__device__ __attribute__((noinline)) void repair(const GatherPlan& p, int n, int row, int h,
                                                 int w) {
  T* to = static_cast<T*>(p.target.data) + n * p.target.stride[0] + row * p.target.stride[1] +
          h * p.target.stride[2] + w * p.target.stride[3];
  const Sum sum = p.op == Op::kForward
                      ? reference::forward_element<Sum, T>(p.params, n, row, h, w)
                      : reference::grad_input_element<Sum, T>(p.params, n, row, h, w);
  *to = convert<T>(sum);
}

// The first row of the four that a lane has in a strip of 16, where it owns runs of kRun.
template <int kRun>
__device__ __forceinline__ int row_of_strip(int lane, int strip) {
  constexpr int kStrips = kRun / 4;  // that a run takes part in
  return strip / kStrips * 4 * kRun + lane % 4 * kRun + strip % kStrips * 4;
}

// The sums of a warp: 16 x 16 tiles of rows x pixels (rows_across: pixels x rows), each lane's as
// mma.cuh says. `warp_row` is the first row; pixel_of(i) the warp's i-th pixel. kRun: rows of a
// run, rows_across, else 0. kActivates: whether p may have an activation.
template <class T, int kRun, bool kActivates, int kPhases, int kStripsA, int kStripsB, class Sum,
          class PixelOf>
__device__ __forceinline__ void store_sums(
    const GatherPlan& p, const GatherPlace& at, int warp_row, const PixelOf& pixel_of,
    Sum (&sums)[kPhases][kStripsA][kStripsB][kAccumulators]) {
  constexpr bool kRowsAcross = kRun != 0;
  const int lane = threadIdx.x % 32;
  const int phase_h = p.h.phase[at.set_h], phase_w = p.w.phase[at.set_w],
            phases = p.w.phase[at.set_w + 1] - phase_w, step_w = p.w.target_step;
  const int64_t* const stride = p.target.stride;
  T* const target =
      static_cast<T*>(p.target.data) + static_cast<int64_t>(at.group) * p.rows * stride[1];
  const auto bias_of = [&](int row) {
    return p.bias && row < p.rows
               ? convert<Sum>(static_cast<const T*>(
                     p.bias)[(at.group * static_cast<int64_t>(p.rows) + row) * p.bias_stride])
               : Sum(0);
  };
  // The output position of a pixel of the tile; h is beyond the target where there is none.
  const auto place_of = [&](int index) {
    Pixel pixel = pixel_of(index);
    pixel.n += at.n0;
    pixel.h = (at.h0 + pixel.h) * p.h.target_step + phase_h;
    pixel.w = (at.w0 + pixel.w) * step_w + phase_w;
    if (pixel.n >= p.target.batch) pixel.h = p.h.target;
    return pixel;
  };

  const bool activated = kActivates && p.params.activation != Activation::kNone;
  bool invalid = false;  // a NaN among the outputs
  if constexpr (kRowsAcross) {
    constexpr int kPiece = 16 / sizeof(T);  // rows of a vector
    const int row0 = warp_row + lane % 4 * kRun;
    if constexpr (kActivates) {
      if (activated) {
        Sum bias[4 * kStripsB];
#pragma unroll
        for (int i = 0; i < 4 * kStripsB; ++i)
          bias[i] = bias_of(warp_row + row_of_strip<kRun>(lane, i / 4) + i % 4);
        activate_sums(p.params, sums, bias,
                      [](int, int n, int e) { return n * 4 + e / 4 * 2 + e % 2; });
      }
    }
    T* to[kStripsA][2];
#pragma unroll
    for (int m = 0; m < kStripsA; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Pixel out = place_of(m * 16 + lane_row(lane, half));
        to[m][half] = out.h < p.h.target && out.w < p.w.target
                          ? target + out.n * stride[0] + row0 * stride[1] + out.h * stride[2] +
                                out.w * stride[3]
                          : nullptr;
      }
#pragma unroll
    for (int piece = 0; piece < 4 * kStripsB; piece += kPiece) {
      const int row = warp_row + row_of_strip<kRun>(lane, piece / 4) + piece % 4,
                count = p.rows - row;
      Sum bias[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) bias[i] = activated ? Sum(0) : bias_of(row + i);
#pragma unroll
      for (int m = 0; m < kStripsA; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!to[m][half]) continue;
          Sum values[kPiece];
#pragma unroll
          for (int i = 0; i < kPiece; ++i) {
            const int r = piece + i;
            values[i] = sums[0][m][r / 4][r % 4 / 2 * 4 + half * 2 + r % 2] + bias[i];
            invalid |= i < count && values[i] != values[i];
          }
          write_run(to[m][half] + (row - row0) * stride[1], values, count, stride[1]);
        }
    }
  } else {
    constexpr int kOutputs = 2 * kPhases;
    Sum bias[kStripsA * 2];
#pragma unroll
    for (int i = 0; i < kStripsA * 2; ++i)
      bias[i] = bias_of(warp_row + i / 2 * 16 + lane_row(lane, i % 2));
    if constexpr (kActivates) {
      if (activated)
        activate_sums(p.params, sums, bias, [](int m, int, int e) { return m * 2 + e / 2 % 2; });
    }
#pragma unroll
    for (int n = 0; n < kStripsB; ++n)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        // Tiles have an even number of columns: the second pixel is the next position.
        const Pixel out = place_of(n * 16 + lane_column(lane, tile * 2));
        if (out.h >= p.h.target) continue;
        const int left = p.w.target - out.w;
        T* const to = target + out.n * stride[0] + out.h * stride[2] + out.w * stride[3];
#pragma unroll
        for (int m = 0; m < kStripsA; ++m)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int row = warp_row + m * 16 + lane_row(lane, half);
            if (row >= p.rows) continue;
            Sum values[kOutputs];
#pragma unroll
            for (int i = 0; i < kOutputs; ++i) {
              values[i] =
                  sums[i % kPhases][m][n][tile * 4 + half * 2 + i / kPhases] + bias[m * 2 + half];
              invalid |= values[i] != values[i];
            }
            if (step_w == kPhases) {
              write_run(to + row * stride[1], values, left < kOutputs ? left : kOutputs, stride[3]);
            } else {
#pragma unroll
              for (int i = 0; i < kOutputs; ++i) {
                const int w = i / kPhases * step_w + i % kPhases;
                if (i % kPhases < phases && w < left)
                  to[row * stride[1] + w * stride[3]] = convert<T>(values[i]);
              }
            }
          }
      }
  }
  if (!invalid) return;
  for (int i = 0; i < kPhases * kStripsA * kStripsB * kAccumulators; ++i) {
    const int e = i % kAccumulators, n = i / kAccumulators % kStripsB,
              m = i / kAccumulators / kStripsB % kStripsA,
              phase = i / kAccumulators / kStripsB / kStripsA;
    const int index_m = m * 16 + lane_row(lane, e / 2 % 2);
    const int in_strip = e / 4 * 2 + e % 2;
    int index_n = n * 16 + lane_column(lane, in_strip);
    if constexpr (kRowsAcross) index_n = row_of_strip<kRun>(lane, n) + in_strip;
    const int row = warp_row + (kRowsAcross ? index_n : index_m);
    Pixel out = place_of(kRowsAcross ? index_m : index_n);
    out.w += phase;
    if (row >= p.rows || phase >= phases || out.h >= p.h.target || out.w >= p.w.target) continue;
    const T value =
        target[out.n * stride[0] + row * stride[1] + out.h * stride[2] + out.w * stride[3]];
    const Sum sum = convert<Sum>(value);
    if (sum != sum) repair<T, Sum>(p, out.n, at.group * p.rows + row, out.h, out.w);
  }
}

template <class T, Product kProduct, int kTile>
__device__ void Gather<T, kProduct, kTile>::store(const GatherPlan& p, const GatherPlace& at,
                                                  Sums& sums) {
  constexpr int kRowWarps = kShape.rows / kShape.warp_rows;
  const int warp = threadIdx.x / 32, warp_pixel = warp / kRowWarps * kShape.warp_pixels;
  store_sums<T, kRowsAcross ? 4 * kStripsB : 0, true>(
      p, at, at.row0 + warp % kRowWarps * kShape.warp_rows,
      [&](int i) { return pixel_of(p.tiling, warp_pixel + i); }, sums);
}

}  // namespace cuda
}  // namespace deconv
