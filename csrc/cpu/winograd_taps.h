// Winograd's short filters for one axis: two neighbouring positions of a phase, computed together,
// share products.
//
// Two taps (three products instead of four) of sources d and weights g:
//
//     y0 = d0 g0 + d1 g1 = (d0 - d1) g0 + d1 (g0 + g1)
//     y1 = d1 g0 + d2 g1 =                d1 (g0 + g1) + (d2 - d1) g1
//
// Three taps (four instead of six):
//
//     y0 = (d0 - d2) g0 + (d1 + d2) (g0 + g1 + g2) / 2 + (d2 - d1) (g0 - g1 + g2) / 2
//     y1 = (d3 - d1) g2 + (d1 + d2) (g0 + g1 + g2) / 2 - (d2 - d1) (g0 - g1 + g2) / 2
//
// One tap stays as it is. So each position has up to four sums of products, to which all its taps
// add, in groups of up to three that follow each other:
//
//     y0 = first + sum + difference        y1 = last + sum - difference
//
// Everything is exact for small integers. Source: S. Winograd, Arithmetic Complexity of
// Computations, 1980; A. Lavin and S. Gray, Fast Algorithms for Convolutional Neural Networks,
// 2016.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "../geometry.h"

namespace deconv {
namespace cpu {

// source[first] + sign * source[second], or with sign 0 source[first] alone; first < second,
// relative to position * step.
struct WinogradValue {
  int64_t first, second;
  int sign;

  bool operator<(const WinogradValue& other) const {
    return std::tie(first, second, sign) < std::tie(other.first, other.second, other.sign);
  }
};

// What a value is multiplied by: sum of factor[i] * w[k[i]].
struct WinogradWeight {
  int count;
  int64_t k[3];
  float factor[3];
};

// The sums of one phase: classes of the tables below, or -1.
struct WinogradPhase {
  int64_t first, last, sum, difference;
  int count() const { return 2 + (sum >= 0) + (difference >= 0); }
};

struct WinogradAxis {
  std::vector<WinogradValue> values;
  std::vector<WinogradWeight> weights;
  std::vector<int64_t> kernel;  // the kernel elements of which they are made
  std::vector<WinogradPhase> phases;
  // Of pairs of positions. Each class is one sum; its offsets are indices of values, its k those of
  // weights. First come those of y0 and y1, where the result is in the end, by ascending phase.
  AxisTaps taps;
  int64_t targets;  // how many these are
  bool shares;      // some products
};

// `direct`: classes of one phase each; of them [first_class, first_class + classes) are taken.
WinogradAxis winograd_axis(const AxisTaps& direct, size_t first_class, size_t classes);

}  // namespace cpu
}  // namespace deconv
