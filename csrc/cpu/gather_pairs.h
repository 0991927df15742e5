// "gemm" for forward and grad_input in bfloat16 by instructions that multiply pairs: the gather
// product (gather_gemm.h) with the tiles of Format, Amx (amx.h) or Dot (dot.h).
//
// As everywhere one side is weights and the other pixels (plan.rows_across). Pairs of channels that
// lie next to each other, as those of pixels in channels_last, are read as they are.
#pragma once

#include "gather_gemm.h"
#include "pair_tiles.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class Format>
bool pairs_take(Op op, const Params& params) {
  const Problem& p = params.problem;
  return params.dtype == Dtype::kBFloat16 &&
         Format::takes((op == Op::kForward ? p.c_in : p.c_out) / p.groups);
}

// Steps summed apart: no less than there are, for a result of 8 bits gains nothing from partial
// sums.
constexpr int64_t kAllAtOnce = int64_t{1} << 60;

template <class Format>
void gather_pairs(Op op, const Params& params, int threads) {
  constexpr int kTiles = sizeof(Format::kTiles) / sizeof(Format::kTiles[0]);
  TileShape shapes[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    const Tile<float>& tile = Format::kTiles[i].tile;
    shapes[i] = {tile.rows, tile.vectors * kLanes<float>,
                 Format::cycles_per_step(tile.rows, tile.vectors)};
  }
  const GatherPlan plan =
      plan_gather(op, params, shapes, kTiles,
                  {sizeof(BFloat16), sizeof(float), kLanes<float>, 2, Format::kUnit}, threads);
  float* packed = static_cast<float*>(call_scratch(plan.weight_elements() * sizeof(float)));
  // Calls use(pointer to pairs).
  const auto with_pairs = [](const void* data, bool as_is, int64_t channel, const auto& use) {
    if (as_is) {
      use(static_cast<const float*>(data));
    } else {
      use(PairRows{static_cast<const BFloat16*>(data), channel / 2});
    }
  };
  with_pairs(plan.source.data, plan.source_as_is, plan.source.stride[1], [&](auto x) {
    with_pairs(plan.weight.data, plan.weight_as_is, plan.weight.channel, [&](auto w) {
      run_gather(
          GatherGemm<float, GatherPixels<float, decltype(x)>, GatherWeights<float, decltype(w)>,
                     GatherStore<BFloat16>, typename Format::Session>{
              plan,
              Format::kTiles[plan.tile].tile,
              kAllAtOnce,
              {plan, w, packed},
              {plan, x},
              {plan}},
          threads);
    });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
