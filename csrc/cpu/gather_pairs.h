// "gemm" for forward and grad_input in bfloat16 by instructions that multiply pairs: the gather
// product (gather_gemm.h) with the tiles of Format, Amx (amx.h) or Dot (dot.h).
//
// As everywhere one side is weights and the other pixels (plan.rows_across). A pair is of channels
// c and c + 1, or of two taps of a phase, one below the other. Pairs of channels that lie next to
// each other, as those of pixels in channels_last, are read as they are.
#pragma once

#include "gather_gemm.h"
#include "pair_tiles.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// What Format multiplies pairs of, if anything. Of taps, where every phase has two or more: then
// they are two thirds as many, or fewer.
template <class Format>
Pairs pairs_of(Op op, const Params& params) {
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  if (params.dtype != Dtype::kBFloat16) return Pairs::kNone;
  if (Format::takes((forward ? p.c_in : p.c_out) / p.groups)) return Pairs::kChannels;
  const bool neighbours =
      forward ? p.h.dilation == 1 && p.h.kernel >= 2 * p.h.stride : p.h.kernel >= 2;
  return Format::kTakesTaps && neighbours ? Pairs::kTaps : Pairs::kNone;
}

// Steps summed apart: no less than there are, for a result of 8 bits gains nothing from partial
// sums.
constexpr int64_t kAllAtOnce = int64_t{1} << 60;

// The weights of a plan that pairs taps.
inline void pair_weights(const GatherPlan& plan, float* to, int threads) {
  const Problem& p = plan.params.problem;
  const BFloat16* data = static_cast<const BFloat16*>(plan.params.w.data);
  const int64_t filters = p.c_out / p.groups, rows = plan.kernel_h * p.w.kernel;
  parallel_for(p.c_in, threads, [&](int64_t c) {
    in_phase(Phase::kWeights, [&] {
      float* row = to + c * filters * rows;
      for (int64_t filter = 0; filter < filters; ++filter)
        for (const auto& [even, odd] : plan.tap_pairs) {
          const bool has_even = even >= 0, has_odd = odd >= 0;
          const PairRows taps{data + plan.params.w.at(c, filter, has_even ? even : odd, 0),
                              has_even && has_odd ? (odd - even) * plan.params.w.stride[2] : 0};
          copy_strided(row, of_pair(taps, has_even, has_odd), plan.params.w.stride[3], p.w.kernel);
          row += p.w.kernel;
        }
    });
  });
}

template <class Format>
void gather_pairs(Op op, const Params& params, int threads) {
  constexpr int kTiles = sizeof(Format::kTiles) / sizeof(Format::kTiles[0]);
  TileShape shapes[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    const Tile<float>& tile = Format::kTiles[i].tile;
    shapes[i] = {tile.rows, tile.vectors * kLanes<float>,
                 Format::cycles_per_step(tile.rows, tile.vectors)};
  }
  const Pairs pairs = pairs_of<Format>(op, params);
  const GatherPlan plan = plan_gather(
      op, params, shapes, kTiles,
      {sizeof(BFloat16), sizeof(float), kLanes<float>, pairs, Format::kUnit, Format::kRounds},
      threads);
  const bool of_taps = pairs == Pairs::kTaps;
  float *packed, *paired;
  const auto carve = [&](void* memory) {
    Carver carver(memory);
    packed = carver.take<float>(plan.weight_elements());
    paired = carver.take<float>(of_taps ? params.problem.groups * plan.weight.group : 0);
    return carver.used();
  };
  carve(call_scratch(carve(nullptr)));
  if (of_taps) pair_weights(plan, paired, threads);
  // Calls use(pointer to pairs).
  const auto with_pairs = [](const void* data, bool as_is, int64_t apart, const auto& use) {
    if (as_is) {
      use(static_cast<const float*>(data));
    } else {
      use(PairRows{static_cast<const BFloat16*>(data), apart});
    }
  };
  const int64_t apart =
      of_taps ? plan.rows_apart * plan.source.stride[2] : plan.source.stride[1] / 2;
  with_pairs(plan.source.data, plan.source_as_is, apart, [&](auto x) {
    with_pairs(
        of_taps ? paired : plan.weight.data, plan.weight_as_is, plan.weight.channel / 2,
        [&](auto w) {
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
