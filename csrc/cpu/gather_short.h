// Tiles of the gather product (gather_gemm.h) whose sums have a few terms, as in the grad_input of
// a single channel: four multiply-adds a result, less than a tile's beginning and end. Here one
// call takes many tiles, and a pixel's factors stay in registers while all rows pass by, so that
// the result is written in the order of memory.
//
//     c[pixel][row] = sum over k < Steps of x[pixel][at k] * weight[k][row] + bias[row]
//
// Terms are added in the order of multiply_tiles, so a result does not depend on which of the two
// computed it.
#pragma once

#include "gather_runs.h"
#include "microkernel.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class T>
struct ShortProduct {
  const T* weights;              // [row tile][step][RN vectors]
  const TileTarget<T>* targets;  // of the tiles of rows, for a tile whose place is zero
  int64_t row_tiles;
  const T* x;                 // what the places of the tiles, or their numbers, count from
  const TilePlace* places;    // all read in place, or all packed
  int64_t tiles, tile_pitch;  // of packed tiles
  const int64_t *row, *at;    // elements from a tile's x: of its pixels, of the steps
};

// S: elements of the target.
template <class T, int RN, int Steps, class Multiply, class S>
void multiply_short(const ShortProduct<T>& p) {
  constexpr int kN = kLanes<T>;
  int64_t at[Steps];
  unroll<Steps>([&](auto k) DECONV_INLINED { at[k] = p.at[k]; });
  for (int64_t t = 0; t < p.tiles; ++t) {
    const TilePlace& place = p.places[t];
    const T* tile = p.x + (place.source >= 0 ? place.source : t * p.tile_pitch);
    for (int64_t m = 0; m < p.targets->rows; ++m) {
      Vector<T> factor[Steps];
      unroll<Steps>([&](auto k) DECONV_INLINED { factor[k] = broadcast(tile[p.row[m] + at[k]]); });
      const T* weights = p.weights;
      for (const TileTarget<T>*to = p.targets, *const end = to + p.row_tiles; to != end; ++to) {
        S* c = reinterpret_cast<S*>(to->c) + place.target + m * to->pitch;
        Vector<T> sum[RN];
        unroll<RN>([&](auto n) DECONV_INLINED { sum[n] = Vector<T>{}; });
        unroll<Steps * RN>([&](auto i) DECONV_INLINED {
          Multiply::template add<T>(sum[i % RN], factor[i / RN], load_vector(weights + i * kN));
        });
        weights += Steps * RN * kN;
        if (to->bias)
          unroll<RN>([&](auto n) DECONV_INLINED { sum[n] += load_vector(to->bias + n * kN); });
        unroll<RN>([&](auto n) DECONV_INLINED { Multiply::store(c + n * kN, sum[n]); });
      }
    }
  }
}

constexpr int kMostShortSteps = 4;

// 1 <= steps <= kMostShortSteps
template <class T, int RN, class Multiply, class S>
void multiply_short_by(int64_t steps, const ShortProduct<T>& product) {
  switch (steps) {
    case 1:
      return multiply_short<T, RN, 1, Multiply, S>(product);
    case 2:
      return multiply_short<T, RN, 2, Multiply, S>(product);
    case 3:
      return multiply_short<T, RN, 3, Multiply, S>(product);
    case 4:
      return multiply_short<T, RN, 4, Multiply, S>(product);
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
