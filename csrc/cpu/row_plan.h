// The plan of the direct gather (direct.h): forward and grad_input of problems with few channels a
// group, as sums of rows.
//
//     target[n, row, t, j * target_step + r] = bias[row] + sum over channels c, kernel rows kh, and
//     taps (kw, offset) of phase r of      source[n, c, s(t, kh), j * source_step + offset] *
//     weight[c, row, kh, kw]
//
// Rows of the source are packed as *copies*: every source_step-th element from a residue on, with
// zeros where the row ends. A tap then reads a copy from a fixed shift on, contiguously; taps with
// nearby offsets of one residue share a copy. Planning is plain C++, compiled once for all
// instruction sets.
#pragma once

#include <vector>

#include "../params.h"

namespace deconv {
namespace cpu {

// Which taps reach an index of the target along one axis: index j * target_step + r has the taps of
// phase r, and a tap reads source index j * source_step + offset where that lies inside.
struct AxisPlan {
  int64_t source_size, target_size, source_step, target_step;
  std::vector<PhaseTap> taps;      // phase after phase
  std::vector<int64_t> first_tap;  // [phases + 1]
};

AxisPlan plan_axis(Op op, const Axis& axis);

// The taps of one index after the other.
struct AxisPosition {
  const AxisPlan& axis;
  int64_t j, r;

  AxisPosition(const AxisPlan& plan, int64_t index)
      : axis(plan), j(index / plan.target_step), r(index % plan.target_step) {}
  void next() {
    if (++r < axis.target_step) return;
    r = 0;
    ++j;
  }
  const PhaseTap* begin() const { return axis.taps.data() + axis.first_tap[r]; }
  const PhaseTap* end() const { return axis.taps.data() + axis.first_tap[r + 1]; }
  // What the tap reads, or -1 where that is outside.
  int64_t source(const PhaseTap& tap) const {
    const int64_t index = j * axis.source_step + tap.offset;
    return index >= 0 && index < axis.source_size ? index : -1;
  }
};

struct RowPlan {
  // copy[i] = source row[(j0 + base + i) * source_step + residue], j0 being the first position;
  // `size` elements of the row have this residue
  struct Copy {
    int64_t residue, base, size;
  };
  struct ColumnTap {
    int64_t k, copy, shift;
  };
  struct ColumnPhase {
    int64_t phase, first_tap, taps;
  };

  TensorRef source, target;
  int64_t groups, channels, rows;  // channels summed and rows computed, of one group
  AxisPlan h, w;
  int64_t positions;  // j runs over [0, positions)
  std::vector<Copy> copies;
  bool all_residues;                // whether copy r is the only one of residue r, for each r
  std::vector<ColumnTap> taps;      // phase after phase
  std::vector<ColumnPhase> phases;  // those that have taps, ascending
  std::vector<int64_t> starts;      // [taps] copy * pitch + shift: what the tap reads
  int64_t piece;                    // positions handled at a time
  int64_t pitch;                    // elements of a copy: a piece in whole vectors, and the shifts
  // Whether packed rows are kept for the next rows of the target: s(t, kh) of a channel lies in
  // slot s % slots of the channel, without conflicts within one t. Too many to keep are packed one
  // at a time.
  bool keep;
  int64_t slots;
  std::vector<int64_t> slot_of;  // [source rows] s % slots, or 0 if they are not kept
};

RowPlan plan_rows(Op op, const Params& params, int lanes);

}  // namespace cpu
}  // namespace deconv
