// The plans of the wgmma kernels: those of gemm_plan.h with another cut of the pixels.
//
// A product of a warpgroup takes the pixels of its operand in groups of 8 neighbours, the groups at
// a constant distance. So a tile is 8 pixels wide, and its rows, of all its images, are at the
// distance of a staged row: pixels lie in shared memory as [plane h][h][image][plane w][w], and
// pixel i of a tile has
//
//     w = i % 8,   image = i / 8 % images,   h = i / 8 / images
//
// and grad_weight has groups of taps of one row of the kernel, [h][image][plane w][w].
//
// Plain C++, no CUDA, so that the CPU tests it.
#pragma once

#include "gemm_plan.h"

namespace deconv {
namespace cuda {

struct WgmmaPlan : GatherPlan {
  uint32_t tile_count;
  int32_t weight_stages;  // rows of the kernel, times a chunk of channels, in flight
  // Byte offsets in shared memory, after the mbarriers.
  int32_t pixels_at, weights_at, source_at;
  int32_t weight_bytes, source_bytes;  // of a stage, of a buffer
};

struct WgmmaWeightPlan : WeightPlan {
  int32_t stages;                        // tiles of pixels in flight
  int32_t tiles_at, dy_at, stage_bytes;  // in shared memory: the first stage; dy within a stage
};

// The condition that fails, of the problem or of the device, or null.
const char* decline_wgmma(Op op, const Params& params, int major, int minor);

// The plan with the tile `name`, or with the best one if it is empty. Throws std::invalid_argument
// if there is no such tile, or it cannot take the problem.
WgmmaPlan plan_wgmma(Op op, const Params& params, const std::string& name, const Device& device);
WgmmaWeightPlan plan_wgmma_weight(const Params& params, const std::string& name,
                                  const Device& device);

// Whether "auto" should take it: the problem of one image fills the tiles, and for grad_weight
// channels are contiguous, since one warpgroup cannot turn around what two multiply.
bool prefer_wgmma(Op op, const Params& params);

}  // namespace cuda
}  // namespace deconv
