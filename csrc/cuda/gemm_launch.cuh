// The kernels of one type and product behind GemmKernels: each tile of configs.h that is compiled
// for the product, chosen by its index.
#pragma once

#include "gemm.h"
#include "gemm_gather.cuh"
#include "gemm_pack.cuh"
#include "gemm_weight.cuh"
#include "launch.h"

namespace deconv {
namespace cuda {

constexpr int64_t kMaxBlocks = 1 << 16;  // of kernels that stride over their elements

template <class T>
void launch_pack(const GatherPlan& g, int rows_of_run, void* stream) {
  PackPlan p{g.params.w.data,
             g.packed,
             g.w_group,
             g.w_channel,
             g.w_row,
             g.w_h,
             g.w_w,
             g.packed_vectors(),
             g.source.channels,
             g.rows,
             g.rows_padded,
             g.vectors,
             g.h.taps,
             g.w.taps,
             rows_of_run,
             {},
             {}};
  std::copy_n(g.h.k, kMaxTaps, p.k_h);
  std::copy_n(g.w.k, kMaxTaps, p.k_w);
  const int64_t blocks = std::min(ceil_div(p.count, kPackThreads), kMaxBlocks);
  launch(pack_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kPackThreads), 0, stream, p,
         "gemm_pack");
}

template <class T, Product kProduct, int kTile = 0>
void launch_gather(const GatherPlan& p, void* stream) {
  if constexpr (kTile < kGatherTileCount) {
    if (p.tile != kTile) return launch_gather<T, kProduct, kTile + 1>(p, stream);
    if constexpr ((kProducts[kProduct].gather_tiles >> kTile & 1) != 0)
      launch(gather_kernel<T, kProduct, kTile>,
             dim3(static_cast<unsigned>(p.blocks), p.combining ? 1 : p.splits),
             dim3(kGatherTiles[kTile].threads()), p.combining ? 0 : p.shared_bytes, stream, p,
             p.combining ? "gemm_combine" : "gemm_gather");
  }
}

template <class T, class Sum>
void launch_weight_reduce(const WeightPlan& w, void* stream) {
  const Problem& q = w.params.problem;
  ReducePlan p{w.params,
               w.partial,
               q.c_in * w.c_out * q.h.kernel * q.w.kernel,
               w.partial_elements(),
               w.splits,
               w.c_in,
               w.c_out,
               w.c_in_padded,
               w.c_out_padded,
               w.h.taps,
               w.w.taps,
               {},
               {}};
  std::fill_n(p.tap_h, kMaxTaps, int16_t{-1});
  std::fill_n(p.tap_w, kMaxTaps, int16_t{-1});
  for (int i = 0; i < w.h.taps; ++i) p.tap_h[w.h.k[i]] = static_cast<int16_t>(i);
  for (int i = 0; i < w.w.taps; ++i) p.tap_w[w.w.k[i]] = static_cast<int16_t>(i);
  const int64_t blocks = std::min(ceil_div(p.count, kReduceThreads), kMaxBlocks);
  launch(weight_reduce_kernel<T, Sum>, dim3(static_cast<unsigned>(blocks)), dim3(kReduceThreads), 0,
         stream, p, "gemm_weight_reduce");
}

template <class T, Product kProduct, int kTile = 0>
void launch_weight(const WeightPlan& p, void* stream) {
  if constexpr (kTile < kWeightTileCount) {
    if (p.tile != kTile) return launch_weight<T, kProduct, kTile + 1>(p, stream);
    if constexpr ((kProducts[kProduct].weight_tiles >> kTile & 1) != 0)
      launch(weight_kernel<T, kProduct, kTile>, dim3(static_cast<unsigned>(p.blocks)),
             dim3(kWeightTiles[kTile].threads()), p.shared_bytes, stream, p, "gemm_weight");
  }
}

template <class T, Product kProduct>
constexpr GemmKernels gemm_kernels() {
  return {launch_gather<T, kProduct>, launch_pack<T>, launch_weight<T, kProduct>,
          launch_weight_reduce<T, typename PixelMma<kProduct, T>::Sum>};
}

}  // namespace cuda
}  // namespace deconv
