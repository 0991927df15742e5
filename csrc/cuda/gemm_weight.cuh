// grad_weight as a matrix product whose K are the pixels of all images:
//
//     dw[ci, co, k] = sum over n, i of x[n, ci, i] * dy[n, co, i * stride + offset(k)]
//
// A block computes c_in x c_out x taps elements over its share of the tiles of pixels (split). It
// stages a tile of x and the tile of dy that its taps touch, halo included, once for all taps
// (gemm_stage.cuh); warps share the tiles and split the taps, so that the operand x of a warp
// serves warp_taps products:
//
//     shared memory   PixelAt [staged pixel of dy], PixelAt [kWeightPixels]
//                     [stage] { x [vector][pixel, pitch][16 bytes], dy [vector][staged pixel,
//                     pitch][16 bytes] }
//
// Sums of a split go to the workspace, in float32 (float64); reduce_kernel adds the splits in their
// order and rounds once. No atomics: the result is the same from run to run.
//
// Bytes moved: x once a tile of c_out and set of taps, dy once a tile of c_in and set of taps, halo
// included; partial sums written and read once, |dw| * splits.
#pragma once

#include "../reference/elements.h"
#include "gemm_stage.cuh"
#include "mma.cuh"

namespace deconv {
namespace cuda {

constexpr int log2_of(int value) { return value == 1 ? 0 : 1 + log2_of(value / 2); }

// Which part of dw, and of the pixels, a block has.
struct WeightPlace {
  int ci, co, set, group_h, group_w, group, split;
};
__device__ inline WeightPlace weight_place(const WeightPlan& p, int c_in, int c_out) {
  unsigned index = blockIdx.x;
  const auto next = [&](int count) {
    const int digit = static_cast<int>(index % count);
    index /= count;
    return digit;
  };
  WeightPlace at;  // neighbouring blocks read the same pixels
  at.co = next(p.c_out_tiles) * c_out;
  at.ci = next(p.c_in_tiles) * c_in;
  at.set = next(p.tap_sets);
  at.group_w = next(p.groups_w);
  at.group_h = next(p.groups_h);
  at.group = next(p.groups);
  at.split = static_cast<int>(index);
  return at;
}

// The tiles of pixels of a split, one after another.
struct SplitTiles {
  int left, n, h, w;  // how many are left, and the place of the next in tiles
  __device__ SplitTiles(const WeightPlan& p, int split) {
    const int64_t tiles = int64_t{p.tiling.tiles_n} * p.tiling.tiles_h * p.tiling.tiles_w;
    const int first = static_cast<int>(tiles * split / p.splits);
    left = static_cast<int>(tiles * (split + 1) / p.splits) - first;
    w = first % p.tiling.tiles_w;
    h = first / p.tiling.tiles_w % p.tiling.tiles_h;
    n = first / p.tiling.tiles_w / p.tiling.tiles_h;
  }
  __device__ void next(const PixelTiling& tiling) {
    --left;
    if (++w < tiling.tiles_w) return;
    w = 0;
    if (++h == tiling.tiles_h) h = 0, ++n;
  }
};

// Where sums of the tap h * p.w.taps + w go: [c_in_padded][c_out_padded] of the split.
template <class Sum>
__device__ Sum* partial_plane(const WeightPlan& p, const WeightPlace& at, int tap) {
  const int64_t planes = static_cast<int64_t>(at.split) * p.groups + at.group;
  return static_cast<Sum*>(p.partial) +
         (planes * (p.h.taps * p.w.taps) + tap) * p.c_in_padded * p.c_out_padded;
}

template <class T, Product kProduct, int kTile>
struct Weight {
  using Mma = PixelMma<kProduct, T>;
  using Sum = typename Mma::Sum;
  static constexpr WeightTile kShape = kWeightTiles[kTile];
  static constexpr int kThreads = kShape.threads(), kTaps = kShape.warp_taps,
                       kBlockTaps = kShape.taps();
  static constexpr int kStripsA = kShape.warp_c_in / 16, kStripsB = kShape.warp_c_out / 16;
  static constexpr int kV = kVectorBytes / sizeof(T);
  static constexpr int kVectorsX = kShape.c_in / kV, kVectorsDy = kShape.c_out / kV;
  using Sums = Sum[kTaps][kStripsA][kStripsB][kAccumulators];

  static constexpr int kLogX = log2_of(kVectorsX), kLogDy = log2_of(kVectorsDy);

  // One tile of pixels. `shift` of a tap is negative where the warp has none.
  __device__ static void multiply_tile(const WeightPlan& p, const unsigned char* s_x,
                                       const unsigned char* s_dy, const int (&shift)[kTaps],
                                       Sums& sums) {
    const int lane = threadIdx.x % 32, row_pitch = p.staged.planes_w * p.staged.extent_w;
    for (int first = 0; first < kWeightPixels; first += Mma::kPixels) {
      const unsigned char* from_x[Mma::kAddresses];
      const unsigned char* from_dy[Mma::kAddresses];
#pragma unroll
      for (int i = 0; i < Mma::kAddresses; ++i) {
        from_x[i] = s_x + (first + Mma::pixel_a(lane, i)) * kVectorBytes;
        const int pixel = first + Mma::pixel_b(lane, i), log_w = p.tiling.log_w,
                  log_h = p.tiling.log_h;
        const int n = pixel >> (log_w + log_h), h = pixel >> log_w & ((1 << log_h) - 1),
                  w = pixel & ((1 << log_w) - 1);
        from_dy[i] =
            s_dy + ((n * p.staged.planes_h * p.staged.extent_h + h) * row_pitch + w) * kVectorBytes;
      }
      typename Mma::A a[kStripsA];
#pragma unroll
      for (int m = 0; m < kStripsA; ++m) {
        const unsigned char* from[Mma::kAddresses];
#pragma unroll
        for (int i = 0; i < Mma::kAddresses; ++i)
          from[i] = from_x[i] + m * (16 / kV) * p.x_pitch * kVectorBytes;
        Mma::load_a(a[m], from, p.x_pitch);
      }
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        if (shift[tap] < 0) continue;
        typename Mma::B b[kStripsB];
#pragma unroll
        for (int n = 0; n < kStripsB; ++n) {
          const unsigned char* from[Mma::kAddresses];
#pragma unroll
          for (int i = 0; i < Mma::kAddresses; ++i)
            from[i] = from_dy[i] + shift[tap] + n * (16 / kV) * p.staged.pitch * kVectorBytes;
          Mma::load_b(b[n], from, p.staged.pitch);
        }
#pragma unroll
        for (int m = 0; m < kStripsA; ++m)
#pragma unroll
          for (int n = 0; n < kStripsB; ++n) Mma::multiply(sums[tap][m][n], a[m], b[n]);
      }
    }
  }

  __device__ static void run(const WeightPlan& p);
};

template <class T, Product kProduct, int kTile>
__device__ void Weight<T, kProduct, kTile>::run(const WeightPlan& p) {
  unsigned char* shared = shared_memory<unsigned char>();
  PixelAt* const s_list_dy = reinterpret_cast<PixelAt*>(shared);
  PixelAt* const s_list_x = s_list_dy + p.staged.pixels;
  unsigned char* const s_tiles = shared + (((p.staged.pixels + kWeightPixels) * 8 + 15) & ~15);
  const int x_bytes = kVectorsX * p.x_pitch * kVectorBytes,
            stage_bytes = x_bytes + kVectorsDy * p.staged.pitch * kVectorBytes;
  const WeightPlace at = weight_place(p, kShape.c_in, kShape.c_out);
  const TapGroup& group_h = p.h.groups[at.group_h];
  const TapGroup& group_w = p.w.groups[at.group_w];
  list_pixels<kThreads>(s_list_dy, p.staged, p.h, group_h, p.w, group_w);
  list_pixels<kThreads>(s_list_x, p.tiling);

  // The warp's part: a tile of channels, and every tap_warps-th tap of the set.
  const int lane = threadIdx.x % 32;
  int warp = threadIdx.x / 32;
  const int tap_warp = warp % kShape.tap_warps;
  warp /= kShape.tap_warps;
  const int ci = warp % (kShape.c_in / kShape.warp_c_in) * kShape.warp_c_in,
            co = warp / (kShape.c_in / kShape.warp_c_in) * kShape.warp_c_out;
  const int taps_w = group_w.tap[kMaxPhases] - group_w.tap[0],
            taps = (group_h.tap[kMaxPhases] - group_h.tap[0]) * taps_w;
  const int offset_x = ci / kV * p.x_pitch * kVectorBytes + Mma::offset_a(lane, p.x_pitch),
            offset_dy =
                co / kV * p.staged.pitch * kVectorBytes + Mma::offset_b(lane, p.staged.pitch);
  int shift[kTaps], tap_at[kTaps];
#pragma unroll
  for (int i = 0; i < kTaps; ++i) {
    const int tap = at.set * kBlockTaps + i * kShape.tap_warps + tap_warp;
    const bool exists = tap < taps;
    const int h = group_h.tap[0] + (exists ? tap / taps_w : 0),
              w = group_w.tap[0] + (exists ? tap % taps_w : 0);
    const int row = p.h.plane[h] * p.staged.extent_h + p.h.step[h];
    shift[i] = exists
                   ? ((row * p.staged.planes_w + p.w.plane[w]) * p.staged.extent_w + p.w.step[w]) *
                         kVectorBytes
                   : -1;
    tap_at[i] = h * p.w.taps + w;
  }

  Sums sums;
#pragma unroll
  for (int i = 0; i < kTaps * kStripsA * kStripsB * kAccumulators; ++i) (&sums[0][0][0][0])[i] = 0;

  SplitTiles tiles(p, at.split);
  const int steps = tiles.left;
  int next_stage = 0, stage = 0;
  const auto issue = [&] {
    if (tiles.left > 0) {
      unsigned char* const to = s_tiles + next_stage * stage_bytes;
      const int n = tiles.n << p.tiling.log_n, h = tiles.h << p.tiling.log_h,
                w = tiles.w << p.tiling.log_w;
      stage_pixels<T, kThreads>(to, p.x_pitch, s_list_x, kWeightPixels, kLogX, p.x, at.group, n, h,
                                w, at.ci);
      stage_pixels<T, kThreads>(to + x_bytes, p.staged.pitch, s_list_dy, p.staged.pixels, kLogDy,
                                p.dy, at.group, n, h * p.h.source_step, w * p.w.source_step, at.co);
      tiles.next(p.tiling);
      next_stage = next_stage + 1 == kWeightStages ? 0 : next_stage + 1;
    }
    copy_async_commit();
  };
  __syncthreads();
  for (int i = 0; i < kWeightStages - 1; ++i) issue();
  for (int step = 0; step < steps; ++step) {
    copy_async_wait<kWeightStages - 2>();
    __syncthreads();
    issue();
    const unsigned char* const s_x = s_tiles + stage * stage_bytes;
    multiply_tile(p, s_x + offset_x, s_x + x_bytes + offset_dy, shift, sums);
    stage = stage + 1 == kWeightStages ? 0 : stage + 1;
  }
  copy_async_wait<0>();

#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) {
    if (shift[tap] < 0) continue;
    Sum* const to = partial_plane<Sum>(p, at, tap_at[tap]);
#pragma unroll
    for (int m = 0; m < kStripsA; ++m)
#pragma unroll
      for (int n = 0; n < kStripsB; ++n)
#pragma unroll
        for (int e = 0; e < kAccumulators; e += 2) {
          const int row = at.ci + ci + m * 16 + lane_row(lane, e / 2 % 2),
                    column = at.co + co + n * 16 + lane_column(lane, e / 4 * 2);
          Vector<Sum, 2> pair;
          pair.at[0] = sums[tap][m][n][e];
          pair.at[1] = sums[tap][m][n][e + 1];
          store(reinterpret_cast<Vector<Sum, 2>*>(to + static_cast<int64_t>(row) * p.c_out_padded +
                                                  column),
                pair);
        }
  }
}

template <class T, Product kProduct, int kTile>
__global__ __launch_bounds__(kWeightTiles[kTile].threads(),
                             1) void weight_kernel(const __grid_constant__ WeightPlan p) {
  Weight<T, kProduct, kTile>::run(p);
}

// ---- the splits in order, rounded once ----------------------------------------------------------

constexpr int kReduceThreads = 128;

struct ReducePlan {
  Params params;
  const void* partial;  // [split][group][tap][c_in_padded][c_out_padded]
  int64_t count, split_elements;
  int32_t splits, c_in, c_out, c_in_padded, c_out_padded, taps_h, taps_w;
  int16_t tap_h[kMaxTaps], tap_w[kMaxTaps];  // of a kernel index; -1: it never meets an input
};

// As in gather_kernel: a NaN that padding made is computed again from the definition.
template <class T, class Sum>
__device__ __attribute__((noinline)) Sum repaired(const ReducePlan& p, int64_t ci, int co, int kh,
                                                  int kw) {
  return reference::grad_weight_element<Sum, T>(p.params, ci, co, kh, kw);
}

template <class T, class Sum>
__global__ __launch_bounds__(kReduceThreads,
                             1) void weight_reduce_kernel(const __grid_constant__ ReducePlan p) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kReduceThreads;
  const int kernel_h = static_cast<int>(p.params.problem.h.kernel),
            kernel_w = static_cast<int>(p.params.problem.w.kernel);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceThreads + threadIdx.x; i < p.count;
       i += stride) {
    const int co = static_cast<int>(i % p.c_out);
    int64_t rest = i / p.c_out;
    const int ci = static_cast<int>(rest % p.c_in);
    rest /= p.c_in;
    const int kw = static_cast<int>(rest % kernel_w),
              kh = static_cast<int>(rest / kernel_w) % kernel_h,
              group = static_cast<int>(rest / kernel_w / kernel_h);
    const int tap_h = p.tap_h[kh], tap_w = p.tap_w[kw];
    Sum sum = 0;
    if (tap_h >= 0 && tap_w >= 0) {
      const Sum* from = static_cast<const Sum*>(p.partial) +
                        ((static_cast<int64_t>(group) * p.taps_h + tap_h) * p.taps_w + tap_w) *
                            p.c_in_padded * p.c_out_padded +
                        static_cast<int64_t>(ci) * p.c_out_padded + co;
      for (int split = 0; split < p.splits; ++split, from += p.split_elements) sum += *from;
    }
    const int64_t channel = static_cast<int64_t>(group) * p.c_in + ci;
    if (sum != sum) sum = repaired<T, Sum>(p, channel, co, kh, kw);
    static_cast<T*>(p.params.w.data)[p.params.w.at(channel, co, kh, kw)] = convert<T>(sum);
  }
}

}  // namespace cuda
}  // namespace deconv
