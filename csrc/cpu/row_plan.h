// The plans of the direct algorithms: forward and grad_input (direct.h) and grad_weight
// (direct_weight.h) of problems with few channels a group, as sums of rows.
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
  // Whether packed rows are kept for all that reads them. Too many to keep are packed one at a
  // time.
  bool keep;

  int64_t row_elements() const { return static_cast<int64_t>(copies.size()) * pitch; }
};

// The rows of dy that grad_weight multiplies (direct_weight.h) are kept line by line: s(t, kh) of a
// channel lies in slot s % slots of the channel, without conflicts within one t.
struct KeptRowsPlan : RowPlan {
  int64_t slots;
  std::vector<int64_t> slot_of;  // [source rows] s % slots, or 0 if they are not kept
};

KeptRowsPlan plan_kept_rows(const Params& params, int lanes);

// Of forward and grad_input, all rows that neighbouring rows of the target read are packed first,
// as an image with zero rows above and below: [channel][image row][copy][pitch]. To each phase
// (h, w) belongs a list of terms, whose places do not change from one row of the target to the
// next.
struct ImagePlan : RowPlan {
  int64_t rows_at_once;         // positions along h whose rows are packed together
  int64_t first_offset;         // source row of the first image row, from that of a position
  int64_t image_rows;           // of rows_at_once positions
  std::vector<int64_t> places;  // [terms] where a term reads, if rows are kept

  int64_t h_positions() const { return ceil_div(h.target_size, h.target_step); }
  // Terms [h phase][w phase][channel][h tap][w tap].
  int64_t all_terms() const { return channels * static_cast<int64_t>(h.taps.size() * taps.size()); }
  int64_t h_phases() const { return static_cast<int64_t>(h.first_tap.size()) - 1; }
  int64_t h_taps(int64_t h_phase) const {
    const size_t r = static_cast<size_t>(h_phase);
    return h.first_tap[r + 1] - h.first_tap[r];
  }
  int64_t first_term(int64_t h_phase, const ColumnPhase& phase) const {
    return channels *
           (h.first_tap[static_cast<size_t>(h_phase)] * static_cast<int64_t>(taps.size()) +
            h_taps(h_phase) * phase.first_tap);
  }
  int64_t terms(int64_t h_phase, const ColumnPhase& phase) const {
    return channels * h_taps(h_phase) * phase.taps;
  }
  // Calls visit(channel, h tap, w tap) for every term.
  template <class Visit>
  void for_each_term(const Visit& visit) const {
    for (size_t r = 0; r + 1 < h.first_tap.size(); ++r)
      for (const ColumnPhase& phase : phases)
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t th = h.first_tap[r]; th < h.first_tap[r + 1]; ++th)
            for (int64_t tw = phase.first_tap; tw < phase.first_tap + phase.taps; ++tw)
              visit(c, th, tw);
  }
};

ImagePlan plan_image(Op op, const Params& params, int lanes);

}  // namespace cpu
}  // namespace deconv
