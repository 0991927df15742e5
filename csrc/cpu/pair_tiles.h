// What multiplies pairs of bfloat16 looks like: tiles of the gather product (gather_pairs.h), whose
// pairs are of channels, and of grad_weight (weight_pairs.h), whose pairs are of pixels. There are
// two of them, amx.h and dot.h.
#pragma once

#include "microkernel.h"
#include "pairs.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// A part of a sum for grad_weight: rows of A hold their pixels side by side, B is a panel of pairs.
struct PairStrip {
  const BFloat16* a;
  const float* b;
  int64_t pairs;
};

// A tile of both products. `row` has the places of the rows of A, in elements from a strip's a on.
struct PairTile {
  Tile<float> tile;
  void (*multiply_strips)(const PairStrip* strips, int64_t count, const int64_t* row, float* c,
                          int64_t pitch, bool accumulate);
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
