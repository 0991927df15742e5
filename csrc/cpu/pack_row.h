// Packing for the direct algorithms: a row of the source as the copies of its plan (row_plan.h).
#pragma once

#include "row_plan.h"
#include "shuffle.h"

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

// Packs all copies of a row, for positions from j0 on; zeros stand where the row ends.
template <class S, class T>
struct RowPacker {
  static constexpr int64_t kN = kLanes<T>;

  const RowPlan& plan;
  CopyRange* ranges;  // [copies]
  // Where every residue has its copy: the elements of each that whole vectors of the row give,
  // which are read once.
  Range split;

  RowPacker(const RowPlan& given, CopyRange* memory, int64_t j0) : plan(given), ranges(memory) {
    split = {0, INT64_MAX};
    for (size_t i = 0; i < plan.copies.size(); ++i) {
      const CopyRange& range = ranges[i] = copy_range(plan, plan.copies[i], j0);
      split.begin = max_of(split.begin, range.first + range.begin);
      split.end = min_of(split.end, range.first + range.end);
    }
    const int64_t step = plan.w.source_step;
    if (plan.source.stride[3] != 1 || !plan.all_residues || (step != 2 && step != 4) ||
        split.end - split.begin < kN)
      split = {0, 0};
  }

  DECONV_PHASE void pack(int64_t n, int64_t channel, int64_t row, T* to) const {
    const S* source = static_cast<const S*>(plan.source.data) + plan.source.at(n, channel, row, 0);
    const int64_t step = plan.w.source_step, pitch = plan.source.stride[3];
    const int64_t copies = static_cast<int64_t>(plan.copies.size());
    // Zeros first: whole vectors of them may cover what elements then take.
    for (int64_t i = 0; i < copies; ++i) {
      T* copy = to + i * plan.pitch;
      const auto zeros = [&](int64_t begin, int64_t end) {
        for (; begin < end; begin += kN)
          store_vector(copy + min_of(begin, plan.pitch - kN), Vector<T>{});
      };
      zeros(0, ranges[i].begin);
      zeros(ranges[i].end, plan.pitch);
    }
    const bool is_split = split.begin < split.end;
    if (is_split) step == 2 ? split_row<2>(source, to) : split_row<4>(source, to);
    for (int64_t i = 0; i < copies; ++i, to += plan.pitch) {
      const CopyRange range = ranges[i];
      const auto element = [&](int64_t at) {
        return source + ((range.first + at) * step + plan.copies[i].residue) * pitch;
      };
      if (is_split) {
        // A residue has few elements besides.
        for (int64_t k = range.begin; k < split.begin - range.first; ++k)
          to[k] = convert<T>(*element(k));
        for (int64_t k = split.end - range.first; k < range.end; ++k)
          to[k] = convert<T>(*element(k));
      } else if (range.begin < range.end) {
        copy_strided(to + range.begin, element(range.begin), step * pitch, range.end - range.begin,
                     plan.pitch - range.begin);
      }
    }
  }

  template <int Step>
  void split_row(const S* source, T* to) const {
    T* at[Step];
    for (int r = 0; r < Step; ++r) at[r] = to + r * plan.pitch - ranges[r].first;
    const auto vectors = [&](int64_t i) {
      Vector<T> v[Step];
      for (int r = 0; r < Step; ++r) v[r] = load_as<T>(source + i * Step + r * kN);
      split_residues<T, Step>(v);
      for (int r = 0; r < Step; ++r) store_vector(at[r] + i, v[r]);
    };
    int64_t i = split.begin;
    for (; i + kN <= split.end; i += kN) vectors(i);
    if (i < split.end) vectors(split.end - kN);
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
