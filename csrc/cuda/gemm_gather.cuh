// forward and grad_input on tensor cores (or scalar multiply-adds): one matrix product over a
// gather, with the tables of gemm_plan.h.
//
//     target[n, row, j * target_step + r] = activation(bias[row] + sum over channels c, taps (k,
//               offset) of phase r of source[n, c, j * source_step + offset] * weight[c, row, k])
//
// A block computes rows x pixels x column phases of one row phase and one group. For each group of
// taps and chunk of channels it stages the source once, halo included (gemm_stage.cuh), and for
// each row of the kernel the weights of all its columns, which gemm_pack.cuh has put in order:
//
//     shared memory   PixelAt [staged pixel]
//                     weights [stage][tap][vector][row][16 bytes]
//                     source  [buffer][vector][staged pixel, pitch][16 bytes]
//
// A step is one row of the kernel times one chunk. Its copies are issued kGatherStages - 1 steps
// ahead. A warp multiplies 16 x 16 tiles (mma.cuh); a tap is an address shift of the source.
//
// Where a sum is long, blocks (x, 0), (x, 1), ... of the grid split the groups of taps of tile x
// and leave their sums in the workspace; a second launch adds them in that order and stores.
//
// Bytes moved: target once; source once a tile of rows and set of phases, halo included, mostly
// from L2; weights once a tile of pixels, from L2.
#pragma once

#include "../reference/elements.h"
#include "gemm_stage.cuh"
#include "mma.cuh"

namespace deconv {
namespace cuda {

// Where a block is.
struct GatherPlace {
  int group, set_h, set_w, row0, n0, h0, w0;  // n0, h0, w0: image and positions of its first pixel
};

__device__ inline GatherPlace gather_place(const GatherPlan& p, int tile_rows, unsigned index) {
  const auto next = [&](int count) {
    const int digit = static_cast<int>(index % count);
    index /= count;
    return digit;
  };
  // Neighbouring blocks read the same source.
  GatherPlace at;
  at.row0 = next(p.row_tiles) * tile_rows;
  at.set_w = next(p.w.sets);
  at.set_h = next(p.h.sets);
  at.w0 = next(p.tiling.tiles_w) << p.tiling.log_w;
  at.h0 = next(p.tiling.tiles_h) << p.tiling.log_h;
  at.n0 = next(p.tiling.tiles_n) << p.tiling.log_n;
  at.group = static_cast<int>(index);
  return at;
}

// Image and position of a pixel of a tile, relative to its first.
struct Pixel {
  int n, h, w;
};

template <class T, Product kProduct, int kTile>
struct Gather {
  using Mma = ChannelMma<kProduct, T>;
  using Sum = typename Mma::Sum;
  static constexpr GatherTile kShape = kGatherTiles[kTile];
  static constexpr int kThreads = kShape.threads(), kPhases = kShape.phases;
  static constexpr bool kRowsAcross = kShape.rows_across;  // B is rows, A pixels; else A is rows
  static constexpr int kRowStrips = kShape.warp_rows / 16, kPixelStrips = kShape.warp_pixels / 16;
  static constexpr int kStripsA = kRowsAcross ? kPixelStrips : kRowStrips;
  static constexpr int kStripsB = kRowsAcross ? kRowStrips : kPixelStrips;
  using Sums = Sum[kPhases][kStripsA][kStripsB][kAccumulators];
  static constexpr int kSums = kShape.accumulators();

  // The weights of one row of the kernel, for all columns of the group and one chunk.
  __device__ static void stage_weights(const GatherPlan& p, const GatherPlace& at,
                                       unsigned char* to, int tap_h, int first_tap, int taps,
                                       int chunk) {
    const int64_t slice = static_cast<int64_t>(p.vectors) * p.rows_padded;
    const unsigned char* from =
        static_cast<const unsigned char*>(p.packed) +
        (((static_cast<int64_t>(at.group) * p.h.taps + tap_h) * p.w.taps + first_tap) * slice +
         static_cast<int64_t>(chunk << p.log_chunk) * p.rows_padded + at.row0) *
            kVectorBytes;
    for (int i = threadIdx.x; i < taps * kShape.rows << p.log_chunk; i += kThreads) {
      const int row = i % kShape.rows, vector = i / kShape.rows & ((1 << p.log_chunk) - 1),
                tap = i / kShape.rows >> p.log_chunk;
      copy_async<kVectorBytes>(to + i * kVectorBytes,
                               from + (tap * slice + vector * p.rows_padded + row) * kVectorBytes,
                               kVectorBytes);
    }
  }

  // One step: all column taps of a group. `pixel_at` and `row_at` are the byte offsets of the
  // lane's addresses.
  template <int kAddressesPixel, int kAddressesRow>
  __device__ static void multiply_step(const GatherPlan& p, const TapGroup& group_w,
                                       const unsigned char* s_weights,
                                       const unsigned char* s_source,
                                       const int (&pixel_at)[kPixelStrips][kAddressesPixel],
                                       const int (&row_at)[kRowStrips][kAddressesRow], Sums& sums) {
    const int chunk_bytes = kShape.rows * kVectorBytes << p.log_chunk;
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase) {
      for (int tap = group_w.tap[phase]; tap < group_w.tap[phase + 1]; ++tap) {
        const unsigned char* weights = s_weights + (tap - group_w.tap[0]) * chunk_bytes;
        const unsigned char* source =
            s_source + (p.w.plane[tap] * p.staged.extent_w + p.w.step[tap]) * kVectorBytes;
        for (int v = 0; v < 1 << p.log_chunk; v += Mma::kVectors) {
          typename Mma::A a[kStripsA];
          typename Mma::B b[kStripsB];
          if constexpr (kRowsAcross) {
            load<true>(a, source, pixel_at);
            load<false>(b, weights, row_at);
          } else {
            load<true>(a, weights, row_at);
            load<false>(b, source, pixel_at);
          }
          weights += Mma::kVectors * kShape.rows * kVectorBytes;
          source += Mma::kVectors * p.staged.pitch * kVectorBytes;
#pragma unroll
          for (int m = 0; m < kStripsA; ++m)
#pragma unroll
            for (int n = 0; n < kStripsB; ++n) Mma::multiply(sums[phase][m][n], a[m], b[n]);
        }
      }
    }
  }

  template <bool kIsA, class Operands, int kStrips, int kAddresses>
  __device__ static void load(Operands (&operands)[kStrips], const unsigned char* base,
                              const int (&at)[kStrips][kAddresses]) {
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      const unsigned char* from[kAddresses];
#pragma unroll
      for (int i = 0; i < kAddresses; ++i) from[i] = base + at[strip][i];
      if constexpr (kIsA)
        Mma::load_a(operands[strip], from);
      else
        Mma::load_b(operands[strip], from);
    }
  }

  __device__ static Pixel pixel_of(const PixelTiling& t, int pixel) {
    return {pixel >> (t.log_w + t.log_h), pixel >> t.log_w & ((1 << t.log_h) - 1),
            pixel & ((1 << t.log_w) - 1)};
  }

  // The sums of this thread in a split, kThreads apart.
  __device__ static Sum* partial_sums(const GatherPlan& p, int split) {
    const int64_t block = static_cast<int64_t>(split) * gridDim.x + blockIdx.x;
    return static_cast<Sum*>(p.partial) + block * (kSums * kThreads) + threadIdx.x;
  }

  __device__ static void run(const GatherPlan& p) {
    const GatherPlace at = gather_place(p, kShape.rows, blockIdx.x);
    Sums sums;
    Sum* const all = &sums[0][0][0][0];
#pragma unroll
    for (int i = 0; i < kSums; ++i) all[i] = 0;
    if (p.combining) {
      for (int split = 0; split < p.splits; ++split) {
        const Sum* const from = partial_sums(p, split);
#pragma unroll
        for (int i = 0; i < kSums; ++i) all[i] += from[i * kThreads];
      }
    } else {
      multiply(p, at, sums);
    }
    if (p.combining || p.splits == 1) return store(p, at, sums);
    Sum* const to = partial_sums(p, blockIdx.y);
#pragma unroll
    for (int i = 0; i < kSums; ++i) to[i * kThreads] = all[i];
  }

  __device__ static void multiply(const GatherPlan& p, const GatherPlace& at, Sums& sums);
  __device__ static void store(const GatherPlan& p, const GatherPlace& at, Sums& sums);
};

// The groups of taps of this block's split.
template <class T, Product kProduct, int kTile>
__device__ __forceinline__ void Gather<T, kProduct, kTile>::multiply(const GatherPlan& p,
                                                                     const GatherPlace& at,
                                                                     Sums& sums) {
  constexpr int kAddressesPixel = kRowsAcross ? Mma::kAddressesA : Mma::kAddressesB;
  constexpr int kAddressesRow = kRowsAcross ? Mma::kAddressesB : Mma::kAddressesA;
  unsigned char* shared = shared_memory<unsigned char>();
  PixelAt* const s_pixels = reinterpret_cast<PixelAt*>(shared);
  unsigned char* const s_weights = shared + ((p.staged.pixels * 8 + 15) & ~15);
  unsigned char* const s_source =
      s_weights + kGatherStages * p.step_vectors * kShape.rows * kVectorBytes;
  const int weight_bytes = p.step_vectors * kShape.rows * kVectorBytes;
  const int source_bytes = p.staged.pitch * kVectorBytes << p.log_chunk;
  const int row_pitch = p.staged.planes_w * p.staged.extent_w;  // pixels of a staged row

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % (kShape.rows / kShape.warp_rows) * kShape.warp_rows;
  const int warp_pixel = warp / (kShape.rows / kShape.warp_rows) * kShape.warp_pixels;
  int pixel_at[kPixelStrips][kAddressesPixel], row_at[kRowStrips][kAddressesRow];
#pragma unroll
  for (int strip = 0; strip < kPixelStrips; ++strip)
#pragma unroll
    for (int i = 0; i < kAddressesPixel; ++i) {
      const Pixel pixel =
          pixel_of(p.tiling, warp_pixel + strip * 16 +
                                 (kRowsAcross ? Mma::index_a(lane, i) : Mma::index_b(lane, i)));
      pixel_at[strip][i] =
          ((pixel.n * p.staged.planes_h * p.staged.extent_h + pixel.h) * row_pitch + pixel.w) *
              kVectorBytes +
          (kRowsAcross ? Mma::offset_a(lane, p.staged.pitch) : Mma::offset_b(lane, p.staged.pitch));
    }
#pragma unroll
  for (int strip = 0; strip < kRowStrips; ++strip)
#pragma unroll
    for (int i = 0; i < kAddressesRow; ++i)
      row_at[strip][i] =
          (warp_row + strip * 16 + (kRowsAcross ? Mma::index_b(lane, i) : Mma::index_a(lane, i))) *
              kVectorBytes +
          (kRowsAcross ? Mma::offset_b(lane, kShape.rows) : Mma::offset_a(lane, kShape.rows));

  const int groups = (p.h.group[at.set_h + 1] - p.h.group[at.set_h]) *
                     (p.w.group[at.set_w + 1] - p.w.group[at.set_w]),
            split = static_cast<int>(blockIdx.y);
  int before = groups * split / p.splits, left = groups * (split + 1) / p.splits - before;
  for (int gh = p.h.group[at.set_h]; gh < p.h.group[at.set_h + 1]; ++gh)
    for (int gw = p.w.group[at.set_w]; gw < p.w.group[at.set_w + 1]; ++gw) {
      if (before-- > 0 || left-- <= 0) continue;
      const TapGroup& group_h = p.h.groups[gh];
      const TapGroup& group_w = p.w.groups[gw];
      const int first_h = group_h.tap[0], taps_h = group_h.tap[kMaxPhases] - first_h,
                first_w = group_w.tap[0], taps_w = group_w.tap[kMaxPhases] - first_w;
      __syncthreads();  // the last group is done with shared memory
      list_pixels<kThreads>(s_pixels, p.staged, p.h, group_h, p.w, group_w);
      __syncthreads();

      int next_chunk = 0, next_tap = 0, next_stage = 0, next_buffer = 0;
      const auto issue = [&] {
        if (next_chunk < p.chunks) {
          stage_weights(p, at, s_weights + next_stage * weight_bytes, first_h + next_tap, first_w,
                        taps_w, next_chunk);
          if (next_tap == 0)
            stage_pixels<T, kThreads>(s_source + next_buffer * source_bytes, p.staged.pitch,
                                      s_pixels, p.staged.pixels, p.log_chunk, p.source, at.group,
                                      at.n0, at.h0 * p.h.source_step, at.w0 * p.w.source_step,
                                      (next_chunk << p.log_chunk) * (kVectorBytes / sizeof(T)));
          next_stage = next_stage + 1 == kGatherStages ? 0 : next_stage + 1;
          if (++next_tap == taps_h) {
            next_tap = 0;
            ++next_chunk;
            next_buffer = next_buffer + 1 == p.source_buffers ? 0 : next_buffer + 1;
          }
        }
        copy_async_commit();
      };
      for (int i = 0; i < kGatherStages - 1; ++i) issue();
      int stage = 0, buffer = 0;
      for (int chunk = 0; chunk < p.chunks; ++chunk) {
        for (int tap = 0; tap < taps_h; ++tap) {
          copy_async_wait<kGatherStages - 2>();
          __syncthreads();
          issue();
          const int shift =
              (p.h.plane[first_h + tap] * p.staged.extent_h + p.h.step[first_h + tap]) * row_pitch *
              kVectorBytes;
          multiply_step(p, group_w, s_weights + stage * weight_bytes,
                        s_source + buffer * source_bytes + shift, pixel_at, row_at, sums);
          stage = stage + 1 == kGatherStages ? 0 : stage + 1;
        }
        buffer = buffer + 1 == p.source_buffers ? 0 : buffer + 1;
      }
    }
  copy_async_wait<0>();
}

template <class T, Product kProduct, int kTile>
__global__ __launch_bounds__(kGatherTiles[kTile].threads(),
                             1) void gather_kernel(const __grid_constant__ GatherPlan p) {
  Gather<T, kProduct, kTile>::run(p);
}

}  // namespace cuda
}  // namespace deconv

#include "gemm_store.cuh"
