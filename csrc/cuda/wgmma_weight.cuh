// grad_weight on sm_90a: the matrix product of gemm_weight.cuh, whose K are the pixels, by products
// of warpgroups (ptx_sm90a.cuh).
//
//     dw[ci, co, k] = sum over n, i of x[n, ci, i] * dy[n, co, i * stride + offset(k)]
//
// A block computes c_in x c_out x taps of one row of the kernel, over its share of the tiles of
// pixels (split). One warpgroup stages tiles of x and of dy (gemm_stage.cuh); the others multiply,
// each by its 64 channels of x. They meet at mbarriers, a pair for each buffer: `full`, when what
// was copied may be multiplied, and `empty`, when it has been.
//
//     shared memory    full and empty [stage]
//                      PixelAt [staged pixel of dy], PixelAt [kWeightPixels]
//                      [stage] { x [vector][pixel, pitch][16 bytes],
//                                dy [vector][staged pixel, pitch][16 bytes] }
//
// Channels are contiguous in it and K are the pixels, so both operands are MN-major: 8 pixels of a
// row of the tile are a core matrix, the next row of the tile is the other half of K, the next
// vector of channels the next 8 rows of D, and a tap is a shift of the address.
//
// Only the columns of dy that its taps touch are staged, of one row of the kernel: where the kernel
// is the stride no byte is staged in vain, and a block of 128 x 256 needs the fewest for a product.
//
// Sums of a split go to the workspace in float32, and gemm's reduction adds them in their order.
#pragma once

#include "gemm_weight.cuh"
#include "wgmma_block.cuh"
#include "wgmma_plan.h"

namespace deconv {
namespace cuda {

template <class T, int kTile>
struct WgmmaWeight {
  static constexpr WgmmaWeightTile kShape = kWgmmaWeightTiles[kTile];
  static constexpr int kTaps = kShape.taps, kSums = kShape.c_out / 2;
  static constexpr int kV = kVectorBytes / sizeof(T);

  const WgmmaWeightPlan& p;
  unsigned char* const shared;
  uint64_t *const full, *const empty;
  PixelAt *const list_dy, *const list_x;
  const WeightPlace at;

  __device__ explicit WgmmaWeight(const WgmmaWeightPlan& plan)
      : p(plan),
        shared(shared_memory<unsigned char>()),
        full(shared_memory<uint64_t>()),
        empty(full + kMaxWgmmaStages),
        list_dy(reinterpret_cast<PixelAt*>(empty + kMaxWgmmaStages)),
        list_x(list_dy + p.staged.pixels),
        at(weight_place(p, kShape.c_in, kShape.c_out)) {}

  // Pixels in the order [h][image][plane w][w], by all threads; a step of an axis is how far its
  // next position is, a base where it begins.
  __device__ __forceinline__ void list_pixels(PixelAt* list, int pixels, int planes, int extent,
                                              int base_h, int step_h, const TapGroup& group_w,
                                              int step_w) {
    for (int i = threadIdx.x; i < pixels; i += kWgmmaThreads) {
      const int u = i % extent, plane = i / extent % planes, row = i / extent / planes;
      PixelAt pixel;
      pixel.n = static_cast<int16_t>(row % p.staged.images);
      pixel.h = static_cast<int16_t>(base_h + row / p.staged.images * step_h);
      pixel.w = static_cast<int16_t>(group_w.base[plane] + u * step_w);
      pixel.exists = plane < group_w.planes;
      cuda::store(list + i, pixel);
    }
  }

  // By one warpgroup.
  __device__ void stage() {
    const bool lag = (p.x.vectors || p.dy.vectors) && p.stages > 2;
    Filled filled{full};
    Ring ring;
    for (SplitTiles tiles(p, at.split); tiles.left > 0; tiles.next(p.tiling)) {
      const int n = tiles.n << p.tiling.log_n, h = tiles.h << p.tiling.log_h,
                w = tiles.w << p.tiling.log_w;
      unsigned char* const to = shared + p.tiles_at + ring.at * p.stage_bytes;
      mbarrier_wait(empty + ring.at, ring.parity ^ 1);
      stage_pixels<T, kWarpgroup>(to, p.x_pitch, list_x, kWeightPixels, log2_of(kShape.c_in / kV),
                                  p.x, at.group, n, h, w, at.ci);
      stage_pixels<T, kWarpgroup>(to + p.dy_at, p.staged.pitch, list_dy, p.staged.pixels,
                                  log2_of(kShape.c_out / kV), p.dy, at.group, n,
                                  h * p.h.source_step, w * p.w.source_step, at.co);
      filled.copied(ring.at, lag);
      ring.next(p.stages);
    }
    filled.finish();
  }

  // By one of the warpgroups that multiply.
  __device__ void multiply(int warpgroup) {
    const TapGroup& group_w = p.w.groups[at.group_w];
    const int first_tap = p.h.groups[at.group_h].tap[0] * p.w.taps + group_w.tap[0];
    const int taps = group_w.tap[kMaxPhases] - group_w.tap[0];
    const int row_pitch = p.staged.planes_w * p.staged.extent_w;  // pixels of a staged row
    const int ci = warpgroup * 64;
    const uint64_t x = matrix_descriptor(shared + p.tiles_at + ci / kV * p.x_pitch * kVectorBytes,
                                         kWgmmaGroupWidth, p.x_pitch);
    const uint64_t dy = matrix_descriptor(shared + p.tiles_at + p.dy_at, row_pitch, p.staged.pitch);
    int shift[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      const int w = group_w.tap[0] + (tap < taps ? tap : 0);
      shift[tap] = p.w.plane[w] * p.staged.extent_w + p.w.step[w];
    }

    float sums[kTaps][kSums];
#pragma unroll
    for (int i = 0; i < kTaps * kSums; ++i) (&sums[0][0])[i] = 0;
    Ring ring;
    int last = -1;  // the buffer whose products are in flight
    const auto release = [&] {
      if (threadIdx.x % 32 == 0 && last >= 0) mbarrier_arrive(empty + last);
    };
    for (int left = SplitTiles(p, at.split).left; left > 0; --left) {
      const int stage = ring.at * (p.stage_bytes / kVectorBytes);
      mbarrier_wait(full + ring.at, ring.parity);
      wgmma_fence();
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap) {
        if (tap >= taps) continue;
        uint64_t matrix_x = move_matrix(x, stage), matrix_dy = move_matrix(dy, stage + shift[tap]);
#pragma unroll
        for (int pixel = 0; pixel < kWeightPixels; pixel += 16) {
          wgmma<T, 1>(sums[tap], matrix_x, matrix_dy);
          matrix_x = move_matrix(matrix_x, 16);
          matrix_dy = move_matrix(matrix_dy, 2 * row_pitch);
        }
      }
      wgmma_commit();
      wgmma_wait<1>();
      release();
      last = ring.at;
      ring.next(p.stages);
    }
    wgmma_wait<0>();
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) wgmma_pin(sums[tap]);
    release();

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (tap >= taps) continue;
      float* const to = partial_plane<float>(p, at, first_tap + tap) +
                        static_cast<int64_t>(at.ci + ci + warp * 16) * p.c_out_padded + at.co;
#pragma unroll
      for (int i = 0; i < kSums; i += 2) {
        Vector<float, 2> pair;
        pair.at[0] = sums[tap][i];
        pair.at[1] = sums[tap][i + 1];
        store(reinterpret_cast<Vector<float, 2>*>(to + lane_row(lane, i / 2 % 2) * p.c_out_padded +
                                                  lane_column(lane, 0) + i / 4 * 8),
              pair);
      }
    }
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kMaxWgmmaStages; ++i) {
        mbarrier_init(full + i, kWarpgroup / 32);
        mbarrier_init(empty + i, kWgmmaConsumers * 4);
      }
      fence_async_proxy();
    }
    const TapGroup itself{{0, 0}, 1, {}};
    list_pixels(list_x, kWeightPixels, 1, kWgmmaGroupWidth, 0, 1, itself, 1);
    list_pixels(list_dy, p.staged.pixels, p.staged.planes_w, p.staged.extent_w,
                p.h.groups[at.group_h].base[0], p.h.source_step, p.w.groups[at.group_w],
                p.w.source_step);
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
      fewer_registers<kCopyRegisters>();
      stage();
    } else {
      more_registers<kProductRegisters>();
      multiply(warpgroup - 1);
    }
  }
};

template <class T, int kTile>
__global__ __launch_bounds__(DECONV_WGMMA_THREADS, 1) void wgmma_weight_kernel(
    const __grid_constant__ WgmmaWeightPlan p) {
#if DECONV_SM90A
  WgmmaWeight<T, kTile>(p).run();
#endif
}

}  // namespace cuda
}  // namespace deconv
