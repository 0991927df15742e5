// Packing for the direct algorithms: a row of the source as the copies of its plan (row_plan.h).
#pragma once

#include "row_plan.h"
#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// All copies of one row, for positions from j0 on; zeros stand where the row ends.
template <class S, class T>
DECONV_PHASE void pack_row(const RowPlan& plan, int64_t n, int64_t channel, int64_t row, int64_t j0,
                           T* to) {
  const S* source = static_cast<const S*>(plan.source.data) + plan.source.at(n, channel, row, 0);
  const int64_t step = plan.w.source_step, size = plan.w.source_size;
  for (const RowPlan::Copy& copy : plan.copies) {
    const int64_t first = (j0 + copy.base) * step + copy.residue;
    const int64_t before = first < 0 ? (-first + step - 1) / step : 0;
    const int64_t inside = size > first ? (size - first + step - 1) / step : 0;
    const int64_t end = min_of(plan.pitch, inside), begin = min_of(before, end);
    for (int64_t i = 0; i < begin; ++i) to[i] = 0;
    if (begin < end)
      copy_strided(to + begin, source + (first + begin * step) * plan.source.stride[3],
                   step * plan.source.stride[3], end - begin, plan.pitch - begin);
    for (int64_t i = end; i < plan.pitch; ++i) to[i] = 0;
    to += plan.pitch;
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
