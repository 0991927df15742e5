// "gemm" for forward and grad_input in bfloat16 by AMX: the gather product (gather_gemm.h) whose
// register tiles are tiles of AMX.
//
// As everywhere one side is weights and the other pixels (plan.rows_across). A tile of A is 16 rows
// of 16 pairs, what channels_last pixels are in memory; a tile of B is 16 pairs of 16 lanes, a
// packed panel.
#pragma once

#include "amx.h"
#include "gather_gemm.h"
#include "pairs.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Segments are whole tiles of pairs.
template <int RM, int RN>
void multiply_amx_tiles(const SegmentList& segments, const TileTask<float>* task, int64_t tasks) {
  using Product = AmxProduct<RM, RN>;
  for (const TileTask<float>* const last = task + tasks; task != last; ++task) {
    const TileTarget<float>& to = task->to;
    Product::begin(to.c, to.pitch, to.accumulate);
    for (int64_t s = 0; s < segments.count; ++s) {
      const Segment& segment = segments.list[s];
      Product::add(task->a + segment.a + task->row[0], task->row[1] - task->row[0],
                   kAmxSide * segments.step_a, task->b + segment.b, segments.step_b,
                   segment.length);
    }
    Product::end(to.c, to.pitch);
  }
}

template <int RM, int RN>
constexpr Tile<float> make_amx_tile() {
  return {RM * static_cast<int>(kAmxSide),
          RN,
          multiply_amx_tiles<RM, RN>,
          multiply_amx_tiles<RM, RN>,
          nullptr,
          nullptr,
          nullptr,
          nullptr};
}

constexpr Tile<float> kAmxTiles[] = {make_amx_tile<2, 2>(), make_amx_tile<1, 4>(),
                                     make_amx_tile<4, 1>(), make_amx_tile<1, 1>()};

inline bool amx_takes(Op op, const Params& params) {
  const Problem& p = params.problem;
  const int64_t channels = (op == Op::kForward ? p.c_in : p.c_out) / p.groups;
  return params.dtype == Dtype::kBFloat16 && channels % (2 * kAmxSide) == 0;
}

// Steps summed apart: no less than there are, for a result of 8 bits gains nothing from partial
// sums.
constexpr int64_t kAllAtOnce = int64_t{1} << 60;

inline void gather_amx(Op op, const Params& params, int threads) {
  constexpr int kTiles = sizeof(kAmxTiles) / sizeof(kAmxTiles[0]);
  TileShape shapes[kTiles];
  for (int i = 0; i < kTiles; ++i)
    shapes[i] = {kAmxTiles[i].rows, kAmxTiles[i].vectors * kLanes<float>,
                 amx_cycles_per_step(kAmxTiles[i].rows / kAmxSide, kAmxTiles[i].vectors)};
  const GatherPlan plan =
      plan_gather(op, params, shapes, kTiles,
                  {sizeof(BFloat16), sizeof(float), kLanes<float>, 2, kAmxSide}, threads);
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
                     GatherStore<BFloat16>, AmxSession>{
              plan, kAmxTiles[plan.tile], kAllAtOnce, {plan, w, packed}, {plan, x}, {plan}},
          threads);
    });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
