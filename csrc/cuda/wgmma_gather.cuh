// forward and grad_input on sm_90a: the matrix product of gemm_gather.cuh, with the same tables, by
// products of warpgroups (ptx_sm90a.cuh).
//
//     target[n, row, j * target_step + r] = bias[row] + sum over channels c, taps (k, offset) of
//                           phase r of source[n, c, j * source_step + offset] * weight[c, row, k]
//
// One block a multiprocessor takes one tile after another. Its warpgroups have roles:
//
//     0, warp 0        copies weights, which gemm_pack.cuh has put in order: neighbouring rows of a
//                      vector of channels are contiguous, so the copy engine takes them (copy_bulk)
//     0, warps 1 to 3  stage the source (gemm_stage.cuh): a gather with zeros around the image, a
//                      step between pixels and any layout, so threads do it, by cp.async where
//                      channels are contiguous and through registers elsewhere; a tensor map would
//                      take neither the unaligned rows of NCHW nor the step
//     1 and 2          multiply and store
//
// They meet at mbarriers, a pair for each buffer: `full`, when what was copied may be multiplied,
// and `empty`, when it has been.
//
//     shared memory    full and empty of weights, full and empty of sources   [stage or buffer]
//                      PixelAt [staged pixel]
//                      weights [stage][tap][vector][row][16 bytes]
//                      source  [buffer][vector][staged pixel, pitch][16 bytes]
//
// A step is one row of the kernel times one chunk of channels, one stage of weights; a chunk is one
// buffer of the source. Each matrix is K-major without swizzle as it lies: 8 rows, or 8 pixels (see
// wgmma_plan.h), of 16 bytes are a core matrix, the next vector of channels is the other half of K,
// and a tap is a shift of the address. NCHW: D = rows x pixels; channels_last: D = pixels x rows.
//
// Products of a step are issued while those of the last one run; then that one's buffers are free.
//
// Bytes moved: as gemm_gather.cuh. Order of summation: group, chunk, row of the kernel, column of
// the kernel, channel, for whatever tile.
#pragma once

#include "gemm_gather.cuh"
#include "wgmma_block.cuh"
#include "wgmma_plan.h"

namespace deconv {
namespace cuda {

constexpr int kSourceWarps = 3;

template <class T, int kTile>
struct Wgmma {
  static constexpr WgmmaTile kShape = kWgmmaTiles[kTile];
  static constexpr int kPhases = kShape.phases, kSums = kShape.columns / 2;
  // Of a warpgroup, and how many are next to each other along the rows.
  static constexpr int kRows = kShape.warpgroup_rows(), kPixels = kShape.warpgroup_pixels(),
                       kAlongRows = kShape.rows / kRows;

  const WgmmaPlan& p;
  unsigned char* const shared;
  uint64_t *const full_weights, *const empty_weights, *const full_source, *const empty_source;

  __device__ explicit Wgmma(const WgmmaPlan& plan)
      : p(plan),
        shared(shared_memory<unsigned char>()),
        full_weights(shared_memory<uint64_t>()),
        empty_weights(full_weights + kMaxWgmmaStages),
        full_source(empty_weights + kMaxWgmmaStages),
        empty_source(full_source + kMaxWgmmaStages) {}

  // Calls f(place, its groups of taps of both axes) for all tiles of this block and groups of them.
  template <class Begin, class Group, class End>
  __device__ __forceinline__ void for_each_tile(const Begin& begin, const Group& group,
                                                const End& end) {
    for (unsigned tile = blockIdx.x; tile < p.tile_count; tile += gridDim.x) {
      const GatherPlace at = gather_place(p, kShape.rows, tile);
      begin(at);
      for (int gh = p.h.group[at.set_h]; gh < p.h.group[at.set_h + 1]; ++gh)
        for (int gw = p.w.group[at.set_w]; gw < p.w.group[at.set_w + 1]; ++gw)
          group(at, p.h.groups[gh], p.w.groups[gw]);
      end(at);
    }
  }

  __device__ static int taps_of(const TapGroup& group) {
    return group.tap[kMaxPhases] - group.tap[0];
  }

  // By one warp.
  __device__ void copy_weights() {
    const int lane = threadIdx.x % 32;
    const int64_t slice = static_cast<int64_t>(p.vectors) * p.rows_padded;
    Ring ring;
    for_each_tile(
        [](const GatherPlace&) {},
        [&](const GatherPlace& at, const TapGroup& group_h, const TapGroup& group_w) {
          const int copies = taps_of(group_w) << p.log_chunk;
          for (int chunk = 0; chunk < p.chunks; ++chunk)
            for (int tap = 0; tap < taps_of(group_h); ++tap) {
              const unsigned char* from =
                  static_cast<const unsigned char*>(p.packed) +
                  (((static_cast<int64_t>(at.group) * p.h.taps + group_h.tap[0] + tap) * p.w.taps +
                    group_w.tap[0]) *
                       slice +
                   static_cast<int64_t>(chunk << p.log_chunk) * p.rows_padded + at.row0) *
                      kVectorBytes;
              unsigned char* to = shared + p.weights_at + ring.at * p.weight_bytes;
              mbarrier_wait(empty_weights + ring.at, ring.parity ^ 1);
              if (lane == 0)
                mbarrier_arrive_expect(full_weights + ring.at, copies * kShape.rows * kVectorBytes);
              __syncwarp();
              for (int i = lane; i < copies; i += 32) {
                const int vector = i & ((1 << p.log_chunk) - 1), tap_w = i >> p.log_chunk;
                copy_bulk(to + i * kShape.rows * kVectorBytes,
                          from + (tap_w * slice + vector * p.rows_padded) * kVectorBytes,
                          kShape.rows * kVectorBytes, full_weights + ring.at);
              }
              ring.next(p.weight_stages);
            }
        },
        [](const GatherPlace&) {});
  }

  // Where staged pixels lie, apart from the bases of a group of taps: `exists` has the planes.
  __device__ void list_staged() {
    const StagedTile& s = p.staged;
    PixelAt* list = reinterpret_cast<PixelAt*>(shared + p.pixels_at);
    for (int i = threadIdx.x; i < s.pixels; i += kWgmmaThreads) {
      const int u = i % s.extent_w, plane_w = i / s.extent_w % s.planes_w,
                n = i / s.extent_w / s.planes_w % s.images,
                rest = i / s.extent_w / s.planes_w / s.images;
      PixelAt at;
      at.n = static_cast<int16_t>(n);
      at.h = static_cast<int16_t>(rest % s.extent_h * p.h.source_step);
      at.w = static_cast<int16_t>(u * p.w.source_step);
      at.exists = static_cast<int16_t>(rest / s.extent_h * kMaxPlanes + plane_w);
      cuda::store(list + i, at);
    }
  }

  // By kSourceWarps warps; `thread` of them.
  __device__ void stage_source(int thread) {
    static_assert(kMaxPlanes == 2, "see below");
    const PixelAt* list = reinterpret_cast<const PixelAt*>(shared + p.pixels_at);
    // Of two buffers none would be left: the other is free after the first products of this chunk.
    const bool lag = p.source.vectors && p.source_buffers > 2;
    Filled filled{full_source};
    Ring ring;
    for_each_tile(
        [](const GatherPlace&) {},
        [&](const GatherPlace& at, const TapGroup& group_h, const TapGroup& group_w) {
          const int h0 = group_h.base[0], h1 = group_h.base[1], w0 = group_w.base[0],
                    w1 = group_w.base[1];
          const int planes_h = group_h.planes, planes_w = group_w.planes;
          const auto place = [&](int i) {
            PixelAt pixel = load(list + i);
            const int plane_h = pixel.exists / kMaxPlanes, plane_w = pixel.exists % kMaxPlanes;
            pixel.h = static_cast<int16_t>(pixel.h + (plane_h ? h1 : h0));
            pixel.w = static_cast<int16_t>(pixel.w + (plane_w ? w1 : w0));
            pixel.exists = plane_h < planes_h && plane_w < planes_w;
            return pixel;
          };
          for (int chunk = 0; chunk < p.chunks; ++chunk) {
            mbarrier_wait(empty_source + ring.at, ring.parity ^ 1);
            stage_pixels<T, kSourceWarps * 32>(
                shared + p.source_at + ring.at * p.source_bytes, p.staged.pitch, place,
                p.staged.pixels, p.log_chunk, p.source, at.group, at.n0, at.h0 * p.h.source_step,
                at.w0 * p.w.source_step,
                (chunk << p.log_chunk) * static_cast<int>(kVectorBytes / sizeof(T)), thread);
            filled.copied(ring.at, lag);
            ring.next(p.source_buffers);
          }
        },
        [](const GatherPlace&) {});
    filled.finish();
  }

  // One step into sums[phase]: operands of the warpgroup at their first tap.
  __device__ __forceinline__ void multiply_step(const TapGroup& group_w, uint64_t weights,
                                                uint64_t source, float (&sums)[kPhases][kSums]) {
#pragma unroll
    for (int phase = 0; phase < kPhases; ++phase)
      for (int tap = group_w.tap[phase]; tap < group_w.tap[phase + 1]; ++tap) {
        uint64_t matrix_w =
            move_matrix(weights, (tap - group_w.tap[0]) * kShape.rows << p.log_chunk);
        uint64_t matrix_s = move_matrix(source, p.w.plane[tap] * p.staged.extent_w + p.w.step[tap]);
        for (int v = 0; v < 1 << p.log_chunk; v += 2) {
          if constexpr (kShape.rows_across)
            wgmma<T>(sums[phase], matrix_s, matrix_w);
          else
            wgmma<T>(sums[phase], matrix_w, matrix_s);
          matrix_w = move_matrix(matrix_w, 2 * kShape.rows);
          matrix_s = move_matrix(matrix_s, 2 * p.staged.pitch);
        }
      }
  }

  // By one of the warpgroups that multiply.
  __device__ void multiply(int warpgroup) {
    const int row0 = warpgroup % kAlongRows * kRows, pixel0 = warpgroup / kAlongRows * kPixels;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int row_pitch = p.staged.planes_w * p.staged.extent_w;  // pixels of a staged row
    const uint64_t weights =
        matrix_descriptor(shared + p.weights_at + row0 * kVectorBytes, kShape.rows, 8);
    const uint64_t source = matrix_descriptor(
        shared + p.source_at + pixel0 / kWgmmaGroupWidth * row_pitch * kVectorBytes, p.staged.pitch,
        row_pitch);
    const auto release = [&](uint64_t* empty, int buffer) {
      if (lane == 0 && buffer >= 0) mbarrier_arrive(empty + buffer);
    };
    float sums[kPhases][kSums];
    Ring stage, buffer;
    int last_stage, last_buffer;  // whose products are in flight
    for_each_tile(
        [&](const GatherPlace&) {
#pragma unroll
          for (int i = 0; i < kPhases * kSums; ++i) (&sums[0][0])[i] = 0;
          last_stage = last_buffer = -1;
        },
        [&](const GatherPlace&, const TapGroup& group_h, const TapGroup& group_w) {
          const int taps_h = taps_of(group_h);
          for (int chunk = 0; chunk < p.chunks; ++chunk) {
            mbarrier_wait(full_source + buffer.at, buffer.parity);
            for (int tap = 0; tap < taps_h; ++tap) {
              const int tap_h = group_h.tap[0] + tap;
              const int shift = (p.h.plane[tap_h] * p.staged.extent_h + p.h.step[tap_h]) *
                                p.staged.images * row_pitch;
              mbarrier_wait(full_weights + stage.at, stage.parity);
              wgmma_fence();
              multiply_step(
                  group_w, move_matrix(weights, stage.at * (p.weight_bytes / kVectorBytes)),
                  move_matrix(source, buffer.at * (p.source_bytes / kVectorBytes) + shift), sums);
              wgmma_commit();
              wgmma_wait<1>();
              release(empty_weights, last_stage);
              release(empty_source, last_buffer);
              last_stage = stage.at;
              last_buffer = tap + 1 == taps_h ? buffer.at : -1;
              stage.next(p.weight_stages);
            }
            buffer.next(p.source_buffers);
          }
        },
        [&](const GatherPlace& at) {
          wgmma_wait<0>();
#pragma unroll
          for (int phase = 0; phase < kPhases; ++phase) wgmma_pin(sums[phase]);
          release(empty_weights, last_stage);
          release(empty_source, last_buffer);
          // As 16 x 16 tiles: a warp has 16 rows of D.
          using Tiles = float[kPhases][1][kShape.columns / 16][kAccumulators];
          store_sums<T, kShape.rows_across ? kWgmmaRun : 0, false>(
              p, at, at.row0 + row0 + (kShape.rows_across ? 0 : warp * 16),
              [&](int i) {
                const int pixel = pixel0 + i + (kShape.rows_across ? warp * 16 : 0),
                          group = pixel / kWgmmaGroupWidth;
                return Pixel{group & (p.staged.images - 1), group >> p.tiling.log_n,
                             pixel % kWgmmaGroupWidth};
              },
              reinterpret_cast<Tiles&>(sums));
        });
  }

  __device__ void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kMaxWgmmaStages; ++i) {
        mbarrier_init(full_weights + i, 1);
        mbarrier_init(empty_weights + i, kWgmmaConsumers * 4);
        mbarrier_init(full_source + i, kSourceWarps);
        mbarrier_init(empty_source + i, kWgmmaConsumers * 4);
      }
      fence_async_proxy();
    }
    list_staged();
    __syncthreads();
    const int warpgroup = threadIdx.x / kWarpgroup;
    if (warpgroup == 0) {
      fewer_registers<kCopyRegisters>();
      if (threadIdx.x < 32)
        copy_weights();
      else
        stage_source(threadIdx.x - 32);
    } else {
      more_registers<kProductRegisters>();
      multiply(warpgroup - 1);
    }
  }
};

template <class T, int kTile>
__global__ __launch_bounds__(DECONV_WGMMA_THREADS,
                             1) void wgmma_kernel(const __grid_constant__ WgmmaPlan p) {
#if DECONV_SM90A
  Wgmma<T, kTile>(p).run();
#endif
}

}  // namespace cuda
}  // namespace deconv
