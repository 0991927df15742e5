// From a strided tensor to the layout of the matrix kernels in shared memory,
//
//     [vector of channels][pixel][v channels],   v * sizeof(T) = 16 bytes,
//
// zero where there is no pixel or no channel. Threads share the vectors; each is copied
//
//     channels contiguous and aligned   by one 16-byte cp.async
//     4- and 8-byte types otherwise     element by element by cp.async
//     2-byte types otherwise            through registers: v reads along the channels, one store
//
// with neighbouring threads along whatever is contiguous in the tensor. Every byte of the tensor
// that the tile needs is read once; NCHW and channels_last differ in nothing else.
#pragma once

#include <cuda_runtime_api.h>

#include "../half.h"
#include "gemm_plan.h"
#include "memory.cuh"
#include "ptx.cuh"

namespace deconv {
namespace cuda {

// Where a staged pixel lies, relative to the tile's first.
struct alignas(8) PixelAt {
  int16_t n, h, w, exists;
};

// The pixels of a group of taps: [image][plane h][h][plane w][w].
template <int kThreads>
__device__ void list_pixels(PixelAt* list, const StagedTile& s, const AxisTable& h,
                            const TapGroup& group_h, const AxisTable& w, const TapGroup& group_w) {
  for (int i = threadIdx.x; i < s.pixels; i += kThreads) {
    const int u = i % s.extent_w, plane_w = i / s.extent_w % s.planes_w,
              rest = i / s.extent_w / s.planes_w;
    const int v = rest % s.extent_h, plane_h = rest / s.extent_h % s.planes_h,
              n = rest / s.extent_h / s.planes_h;
    const bool exists = plane_h < group_h.planes && plane_w < group_w.planes;
    PixelAt at;
    at.n = static_cast<int16_t>(n);
    at.h = static_cast<int16_t>(exists ? group_h.base[plane_h] + v * h.source_step : 0);
    at.w = static_cast<int16_t>(exists ? group_w.base[plane_w] + u * w.source_step : 0);
    at.exists = exists;
    store(list + i, at);
  }
}

// The pixels of a tile itself: [image][h][w].
template <int kThreads>
__device__ void list_pixels(PixelAt* list, const PixelTiling& tiling) {
  for (int i = threadIdx.x; i < 1 << (tiling.log_n + tiling.log_h + tiling.log_w); i += kThreads) {
    PixelAt at;
    at.w = static_cast<int16_t>(i & ((1 << tiling.log_w) - 1));
    at.h = static_cast<int16_t>(i >> tiling.log_w & ((1 << tiling.log_h) - 1));
    at.n = static_cast<int16_t>(i >> (tiling.log_w + tiling.log_h));
    at.exists = 1;
    store(list + i, at);
  }
}

constexpr int kBatch =
    3;  // vectors of a thread that are read before the first is written; 4 would spill

// Vectors [c0, c0 + (1 << log_vectors) * v) of channels of `pixels` pixels, by kThreads threads of
// which this is number `thread`; place(i) says where pixel i lies, relative to the first of the
// tile at (n0, h0, w0). Asynchronous copies are left for the caller to commit.
template <class T, int kThreads, class Place>
__device__ __forceinline__ void stage_pixels(unsigned char* to, int pitch, const Place& place,
                                             int pixels, int log_vectors, const Operand& o,
                                             int group, int n0, int h0, int w0, int c0,
                                             int thread) {
  constexpr int kV = kVectorBytes / sizeof(T);
  const T* base = static_cast<const T*>(o.data) + n0 * o.stride[0] +
                  (static_cast<int64_t>(group) * o.channels + c0) * o.stride[1];
  const int stride_n = static_cast<int>(o.stride[0]), stride_h = static_cast<int>(o.stride[2]),
            stride_w = static_cast<int>(o.stride[3]);
  const int64_t stride_c = o.stride[1];
  const int lane = thread % 32;
  const int total = (o.channel_fastest ? pixels : (pixels + 31) & ~31) << log_vectors;

  struct Piece {
    const T* from;
    unsigned char* to;
    int count;  // of channels that exist; -1: nothing to write
  };
  const auto piece = [&](int i) {
    const int vector = (o.channel_fastest ? i : i >> 5) & ((1 << log_vectors) - 1);
    const int pixel = o.channel_fastest ? i >> log_vectors : (i >> 5 >> log_vectors << 5) + lane;
    if (i >= total || pixel >= pixels) return Piece{static_cast<const T*>(o.data), to, -1};
    const PixelAt at = place(pixel);
    const int h = h0 + at.h, w = w0 + at.w, left = o.channels - c0 - vector * kV;
    const bool inside = at.exists && n0 + at.n < o.batch &&
                        static_cast<unsigned>(h) < static_cast<unsigned>(o.h) &&
                        static_cast<unsigned>(w) < static_cast<unsigned>(o.w);
    const int count = inside && left > 0 ? (left < kV ? left : kV) : 0;
    return Piece{count == 0 ? static_cast<const T*>(o.data)
                            : base + (at.n * stride_n + h * stride_h + w * stride_w) +
                                  vector * kV * stride_c,
                 to + (vector * pitch + pixel) * kVectorBytes, count};
  };

  if (o.vectors) {
    for (int i = thread; i < total; i += kThreads) {
      const Piece p = piece(i);
      if (p.count >= 0)
        copy_async<kVectorBytes>(p.to, p.from, p.count * static_cast<int>(sizeof(T)));
    }
  } else if constexpr (sizeof(T) >= 4) {
    for (int i = thread; i < total; i += kThreads) {
      const Piece p = piece(i);
      if (p.count < 0) continue;
#pragma unroll
      for (int e = 0; e < kV; ++e)
        copy_async<sizeof(T)>(p.to + e * sizeof(T), e < p.count ? p.from + e * stride_c : p.from,
                              e < p.count ? static_cast<int>(sizeof(T)) : 0);
    }
  } else {
    for (int i = thread; i < total; i += kBatch * kThreads) {
      Piece p[kBatch];
      uint16_t bits[kBatch][kV];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        p[b] = piece(i + b * kThreads);
#pragma unroll
        for (int e = 0; e < kV; ++e)
          bits[b][e] = e < p[b].count ? p[b].from[e * stride_c].bits : uint16_t{0};
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        Vector<uint32_t, 4> pairs;
#pragma unroll
        for (int e = 0; e < kV; e += 2)
          pairs.at[e / 2] = bits[b][e] | static_cast<uint32_t>(bits[b][e + 1]) << 16;
        if (p[b].count >= 0) store(reinterpret_cast<Vector<uint32_t, 4>*>(p[b].to), pairs);
      }
    }
  }
}

// The same, by all threads of a block and a list of list_pixels.
template <class T, int kThreads>
__device__ void stage_pixels(unsigned char* to, int pitch, const PixelAt* list, int pixels,
                             int log_vectors, const Operand& o, int group, int n0, int h0, int w0,
                             int c0) {
  stage_pixels<T, kThreads>(
      to, pitch, [list](int i) { return load(list + i); }, pixels, log_vectors, o, group, n0, h0,
      w0, c0, static_cast<int>(threadIdx.x));
}

}  // namespace cuda
}  // namespace deconv
