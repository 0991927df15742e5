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

struct RowPlan {
  // copy[i] = source row[(j0 + base + i) * source_step + residue], j0 being the first position
  struct Copy {
    int64_t residue, base;
  };
  struct ColumnTap {
    int64_t k, copy, shift;
  };
  struct ColumnPhase {
    int64_t phase, first_tap, taps;
  };

  TensorRef source, target;
  int64_t groups, channels, rows;  // channels summed and rows computed, of one group
  int64_t source_size, target_size, source_step, target_step;  // of the columns
  int64_t positions;                                           // j runs over [0, positions)
  int64_t row_count;                                           // t runs over [0, row_count)
  std::vector<Copy> copies;
  std::vector<ColumnTap> taps;      // phase after phase
  std::vector<ColumnPhase> phases;  // those that have taps, ascending
  std::vector<int64_t> starts;      // [taps] copy * pitch + shift: what the tap reads
  int64_t piece;                    // positions handled at a time
  int64_t pitch;                    // elements of a copy: a piece in whole vectors, and the shifts
  // Whether packed rows are kept for the next rows of the target: s(t, kh) of a channel lies in its
  // slot s % slots, without conflicts within one t. Too many to keep are packed one at a time.
  bool keep;
  int64_t slots;
};

RowPlan plan_rows(Op op, const Params& params, int lanes);

}  // namespace cpu
}  // namespace deconv
