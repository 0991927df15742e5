#include "row_plan.h"

#include <numeric>

namespace deconv {
namespace cpu {
namespace {

// Packed rows stay in L2 (elements); a piece of a row is long enough to hide what a row costs.
constexpr int64_t kPacked = 64 << 10, kMostPacked = 256 << 10;
constexpr int64_t kLeastPiece = 64, kMostPiece = 4096;
// Rows of the target that share an image.
constexpr int64_t kTargetRows = 32;
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

// Axes and columns.
void plan_rows(RowPlan& plan, Op op, const Params& params) {
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  plan.groups = p.groups;
  plan.source = forward ? params.x : params.y;
  plan.target = forward ? params.y : params.x;
  plan.channels = (forward ? p.c_in : p.c_out) / p.groups;
  plan.rows = (forward ? p.c_out : p.c_in) / p.groups;
  plan.h = plan_axis(op, p.h);
  plan.w = plan_axis(op, p.w);
  plan.positions = ceil_div(plan.w.target_size, plan.w.target_step);
  plan_columns(plan);
}

// Pieces for so many packed rows. Whether they fit.
bool choose_piece(RowPlan& plan, int64_t rows, int lanes) {
  int64_t most_shift = 0;
  for (const RowPlan::ColumnTap& tap : plan.taps) most_shift = std::max(most_shift, tap.shift);
  const int64_t each = std::max<int64_t>(1, rows * static_cast<int64_t>(plan.copies.size()));
  plan.piece =
      std::min(plan.positions, std::min(kMostPiece, std::max(kLeastPiece, kPacked / each)));
  // Copies begin at whole vectors, so that only taps that are shifted read across cache lines.
  const int64_t vectors = ceil_div(plan.piece, lanes) + ceil_div(most_shift, lanes);
  plan.pitch = vectors * lanes;
  plan.starts.clear();
  for (const RowPlan::ColumnTap& tap : plan.taps)
    plan.starts.push_back(tap.copy * plan.pitch + tap.shift);
  return each * plan.pitch <= kMostPacked;
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

KeptRowsPlan plan_kept_rows(const Params& params, int lanes) {
  const Axis& axis = params.problem.h;
  KeptRowsPlan plan{};
  plan_rows(plan, Op::kGradInput, params);
  plan.slots = axis.kernel;
  while (std::gcd(axis.dilation, plan.slots) != 1) ++plan.slots;
  plan.keep = choose_piece(plan, plan.channels * plan.slots, lanes);
  if (!plan.keep) {
    plan.slots = 1;
    choose_piece(plan, 1, lanes);
  }
  for (int64_t row = 0; row < plan.h.source_size; ++row) plan.slot_of.push_back(row % plan.slots);
  return plan;
}

ImagePlan plan_image(Op op, const Params& params, int lanes) {
  ImagePlan plan{};
  plan_rows(plan, op, params);
  const auto by_offset = [](const PhaseTap& a, const PhaseTap& b) { return a.offset < b.offset; };
  const auto ends = std::minmax_element(plan.h.taps.begin(), plan.h.taps.end(), by_offset);
  const bool any = !plan.h.taps.empty();
  plan.first_offset = any ? ends.first->offset : 0;
  const int64_t span = any ? ends.second->offset - plan.first_offset + 1 : 0;
  // At least as many rows as the first of them reads, or most would be packed again. Apart from
  // that, fewer rows are better than pieces of rows.
  const int64_t least = std::max<int64_t>(2, ceil_div(span, plan.h.source_step));
  const int64_t row = plan.channels * static_cast<int64_t>(plan.copies.size()) *
                      std::min(plan.positions, kMostPiece);
  plan.rows_at_once = std::max<int64_t>(
      1, std::min(std::max(ceil_div(kTargetRows, plan.h.target_step), least), plan.h_positions()));
  for (;; plan.rows_at_once = ceil_div(plan.rows_at_once, 2)) {
    plan.image_rows = (plan.rows_at_once - 1) * plan.h.source_step + span;
    if (plan.rows_at_once > least && plan.image_rows * row > kPacked) continue;
    plan.keep = choose_piece(plan, plan.channels * plan.image_rows, lanes);
    if (plan.keep || plan.rows_at_once == 1) break;
  }
  if (!plan.keep) {
    choose_piece(plan, 1, lanes);
    return plan;
  }
  plan.places.reserve(static_cast<size_t>(plan.all_terms()));
  plan.for_each_term([&](int64_t c, int64_t th, int64_t tw) {
    const int64_t row =
        c * plan.image_rows + plan.h.taps[static_cast<size_t>(th)].offset - plan.first_offset;
    plan.places.push_back(row * plan.row_elements() + plan.starts[static_cast<size_t>(tw)]);
  });
  return plan;
}

}  // namespace cpu
}  // namespace deconv
