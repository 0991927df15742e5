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

void plan_columns(RowPlan& plan) {
  const std::vector<PhaseTap>& taps = plan.w.taps;
  const int64_t step = plan.w.source_step;
  std::vector<RowPlan::Copy> wanted;  // one a tap: its residue and its offset in steps
  for (const PhaseTap& tap : taps) {
    const int64_t base = floor_div(tap.offset, step);
    const int64_t residue = tap.offset - base * step;
    wanted.push_back({residue, base, ceil_div(plan.w.source_size - residue, step)});
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
  plan.all_residues = static_cast<int64_t>(plan.copies.size()) == step;
  for (size_t r = 0; r < plan.copies.size(); ++r)
    plan.all_residues &= plan.copies[r].residue == static_cast<int64_t>(r);
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

AxisPlan plan_axis(Op op, const Axis& axis) {
  AxisPlan plan{axis.out, axis.in, axis.stride, 1, {}, {0}};
  if (op == Op::kForward) {
    plan = {axis.in, axis.out, 1, axis.stride, forward_tap_list(axis), {0}};
  } else {
    for (const Tap& tap : grad_input_tap_list(axis)) plan.taps.push_back({0, tap.k, tap.offset});
  }
  const int64_t phases = std::min(plan.target_step, plan.target_size);
  for (int64_t r = 0, i = 0; r < phases; ++r) {
    while (i < static_cast<int64_t>(plan.taps.size()) && plan.taps[i].phase == r) ++i;
    plan.first_tap.push_back(i);
  }
  return plan;
}

RowPlan plan_rows(Op op, const Params& params, int lanes) {
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  RowPlan plan{};
  plan.groups = p.groups;
  plan.source = forward ? params.x : params.y;
  plan.target = forward ? params.y : params.x;
  plan.channels = (forward ? p.c_in : p.c_out) / p.groups;
  plan.rows = (forward ? p.c_out : p.c_in) / p.groups;
  plan.h = plan_axis(op, p.h);
  plan.w = plan_axis(op, p.w);
  plan.positions = ceil_div(plan.w.target_size, plan.w.target_step);
  plan_columns(plan);

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
  if (!plan.keep) {
    plan.slots = 1;
    choose_piece(1);
  }
  for (int64_t row = 0; row < plan.h.source_size; ++row) plan.slot_of.push_back(row % plan.slots);
  for (const RowPlan::ColumnTap& tap : plan.taps)
    plan.starts.push_back(tap.copy * plan.pitch + tap.shift);
  return plan;
}

}  // namespace cpu
}  // namespace deconv
