// The kernels of one type behind WgmmaKernels: each tile of configs.h, chosen by its index.
#pragma once

#include "launch.h"
#include "wgmma.h"
#include "wgmma_gather.cuh"
#include "wgmma_weight.cuh"

namespace deconv {
namespace cuda {

template <class T, int kTile = 0>
void launch_wgmma(const WgmmaPlan& p, void* stream) {
  if constexpr (kTile < kWgmmaTileCount) {
    if (p.tile != kTile) return launch_wgmma<T, kTile + 1>(p, stream);
    launch(wgmma_kernel<T, kTile>, dim3(static_cast<unsigned>(p.blocks)), dim3(kWgmmaThreads),
           p.shared_bytes, stream, p, "wgmma_gather");
  }
}

template <class T, int kTile = 0>
void launch_wgmma_weight(const WgmmaWeightPlan& p, void* stream) {
  if constexpr (kTile < kWgmmaWeightTileCount) {
    if (p.tile != kTile) return launch_wgmma_weight<T, kTile + 1>(p, stream);
    launch(wgmma_weight_kernel<T, kTile>, dim3(static_cast<unsigned>(p.blocks)),
           dim3(kWgmmaThreads), p.shared_bytes, stream, p, "wgmma_weight");
  }
}

template <class T>
constexpr WgmmaKernels wgmma_kernels() {
  return {launch_wgmma<T>, launch_wgmma_weight<T>,
          [] { return accepts(wgmma_kernel<T, 0>, kWgmmaThreads); }};
}

}  // namespace cuda
}  // namespace deconv
