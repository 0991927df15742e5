#include "row_plan.h"

#include <numeric>

namespace deconv {
namespace cpu {
namespace {

// Packed rows stay in L2 (elements); a piece of a row is long enough to hide what a row costs.
constexpr int64_t kPacked = 64 << 10, kMostPacked = 256 << 10;
constexpr int64_t kLeastPiece = 64, kMostPiece = 4096;
// Taps further apart than this get copies of their own: scratch must not grow with the dilation.
constexpr int64_t kMostShift = 64;

void plan_columns(RowPlan& plan, std::vector<PhaseTap> taps) {
  const int64_t step = plan.source_step;
  std::vector<RowPlan::Copy> wanted;  // one a tap: its residue and its offset in steps
  for (const PhaseTap& tap : taps) {
    const int64_t base = floor_div(tap.offset, step);
    wanted.push_back({tap.offset - base * step, base});
  }
  std::vector<RowPlan::Copy> sorted = wanted;
  const auto before = [](const RowPlan::Copy& a, const RowPlan::Copy& b) {
    return a.residue != b.residue ? a.residue < b.residue : a.base < b.base;
  };
  std::sort(sorted.begin(), sorted.end(), before);
  for (const RowPlan::Copy& c : sorted)
    if (plan.copies.empty() || plan.copies.back().residue != c.residue ||
        c.base - plan.copies.back().base > kMostShift)
      plan.copies.push_back(c);
  for (size_t i = 0; i < taps.size(); ++i) {
    const auto next = std::upper_bound(plan.copies.begin(), plan.copies.end(), wanted[i], before);
    const int64_t copy = next - plan.copies.begin() - 1;
    if (plan.phases.empty() || plan.phases.back().phase != taps[i].phase)
      plan.phases.push_back({taps[i].phase, static_cast<int64_t>(i), 0});
    ++plan.phases.back().taps;
    plan.taps.push_back(
        {taps[i].k, copy, wanted[i].base - plan.copies[static_cast<size_t>(copy)].base});
  }
}

}  // namespace

RowPlan plan_rows(Op op, const Params& params, int lanes) {
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  RowPlan plan{};
  plan.groups = p.groups;
  plan.source = forward ? params.x : params.y;
  plan.target = forward ? params.y : params.x;
  plan.channels = (forward ? p.c_in : p.c_out) / p.groups;
  plan.rows = (forward ? p.c_out : p.c_in) / p.groups;
  plan.source_size = forward ? p.w.in : p.w.out;
  plan.target_size = forward ? p.w.out : p.w.in;
  plan.row_count = forward ? p.h.out : p.h.in;
  plan.source_step = forward ? 1 : p.w.stride;
  plan.target_step = forward ? p.w.stride : 1;
  plan.positions = ceil_div(plan.target_size, plan.target_step);
  std::vector<PhaseTap> taps;
  if (forward) {
    taps = forward_tap_list(p.w);
  } else {
    for (const Tap& tap : grad_input_tap_list(p.w)) taps.push_back({0, tap.k, tap.offset});
  }
  plan_columns(plan, taps);

  // Consecutive kernel rows read source rows that are this far apart.
  const int64_t row_step =
      forward ? p.h.dilation / std::gcd(p.h.dilation, p.h.stride) : p.h.dilation;
  const int64_t copies = static_cast<int64_t>(plan.copies.size());
  plan.slots =
      forward ? ceil_div(p.h.kernel, p.h.stride / std::gcd(p.h.stride, p.h.dilation)) : p.h.kernel;
  while (std::gcd(row_step, plan.slots) != 1) ++plan.slots;
  int64_t most_shift = 0;
  for (const RowPlan::ColumnTap& tap : plan.taps) most_shift = std::max(most_shift, tap.shift);
  const auto choose_piece = [&](int64_t rows) {
    const int64_t each = std::max<int64_t>(1, rows * copies);
    plan.piece =
        std::min(plan.positions, std::min(kMostPiece, std::max(kLeastPiece, kPacked / each)));
    plan.pitch = ceil_div(plan.piece, lanes) * lanes + most_shift;
    return each * plan.pitch;
  };
  plan.keep = choose_piece(plan.channels * plan.slots) <= kMostPacked;
  if (!plan.keep) choose_piece(1);
  for (const RowPlan::ColumnTap& tap : plan.taps)
    plan.starts.push_back(tap.copy * plan.pitch + tap.shift);
  return plan;
}

}  // namespace cpu
}  // namespace deconv
