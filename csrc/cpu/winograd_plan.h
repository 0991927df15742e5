// The plan of "winograd" (winograd.h): a gather (gather.h) of pairs of positions, whose offsets are
// transformed values of the source (winograd_taps.h) and whose kernel is the transformed one.
#pragma once

#include "gather.h"
#include "winograd_taps.h"

namespace deconv {
namespace cpu {

// Some phases of the result; the others have plans of their own, so that the sums of one fit the
// cache.
struct WinogradPlan {
  GatherPlan gather;
  WinogradAxis h, w;
  GatherPlan stored;  // the same with only the classes where results are in the end
};

// Elements of the kernel that are held as vectors while they are transformed.
constexpr int64_t kWinogradKernel = 256;

// Elements of the source that are transposed at a time; rows of it, those between included.
constexpr int64_t kWinogradPatch = 16384, kWinogradSpan = 256;

// Why it cannot take the problem, or null.
const char* winograd_declines(Op op, const Params& params);

// Whether it is faster than "gemm" by the model, for a batch of one image.
bool winograd_pays(Op op, const Params& params, const TileShape* tiles, int tile_count,
                   const PanelFormat& format);

std::vector<WinogradPlan> plan_winograd(Op op, const Params& params, const TileShape* tiles,
                                        int tile_count, const PanelFormat& format, int threads);

}  // namespace cpu
}  // namespace deconv
