// Packing for the direct algorithms: a row of the source as the copies of its plan (row_plan.h).
#pragma once

#include "row_plan.h"
#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// What one row contributes to a copy: its elements [begin, end), of which the first of a copy from
// j0 on is element `first` of the residue.
struct CopyRange {
  int64_t first, begin, end;
};
inline CopyRange copy_range(const RowPlan& plan, const RowPlan::Copy& copy, int64_t j0) {
  const int64_t first = j0 + copy.base,
                end = max_of<int64_t>(0, min_of(plan.pitch, copy.size - first));
  return {first, max_of<int64_t>(0, min_of(-first, end)), end};
}

// Where every residue has its copy: the vectors of the row that all of them take whole, read once.
// Returns which elements of each residue are done.
template <int Step, class S, class T>
inline Range split_row(const RowPlan& plan, const S* source, int64_t j0, T* to) {
  constexpr int64_t kN = kLanes<T>;
  T* at[Step];
  Range inside{0, INT64_MAX};
  for (int r = 0; r < Step; ++r) {
    const CopyRange range = copy_range(plan, plan.copies[r], j0);
    at[r] = to + r * plan.pitch - range.first;
    inside.begin = max_of(inside.begin, range.first + range.begin);
    inside.end = min_of(inside.end, range.first + range.end);
  }
  int64_t i = inside.begin;
  for (; i + kN <= inside.end; i += kN) {
    Vector<T> v[Step];
    for (int r = 0; r < Step; ++r) v[r] = load_as<T>(source + i * Step + r * kN);
    split_residues<T, Step>(v);
    for (int r = 0; r < Step; ++r) store_vector(at[r] + i, v[r]);
  }
  return {inside.begin, i};
}

// All copies of one row, for positions from j0 on; zeros stand where the row ends.
template <class S, class T>
DECONV_PHASE void pack_row(const RowPlan& plan, int64_t n, int64_t channel, int64_t row, int64_t j0,
                           T* to) {
  const S* source = static_cast<const S*>(plan.source.data) + plan.source.at(n, channel, row, 0);
  const int64_t step = plan.w.source_step, pitch = plan.source.stride[3];
  Range split{0, 0};
  if (pitch == 1 && plan.all_residues)
    split = step == 2   ? split_row<2>(plan, source, j0, to)
            : step == 4 ? split_row<4>(plan, source, j0, to)
                        : split;
  for (const RowPlan::Copy& copy : plan.copies) {
    const CopyRange range = copy_range(plan, copy, j0);
    const auto pack = [&](int64_t begin, int64_t end) {
      if (begin < end)
        copy_strided(to + begin, source + ((range.first + begin) * step + copy.residue) * pitch,
                     step * pitch, end - begin);
    };
    for (int64_t i = 0; i < range.begin; ++i) to[i] = 0;
    if (split.begin < split.end) {
      pack(range.begin, split.begin - range.first);
      pack(split.end - range.first, range.end);
    } else {
      pack(range.begin, range.end);
    }
    for (int64_t i = range.end; i < plan.pitch; ++i) to[i] = 0;
    to += plan.pitch;
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
