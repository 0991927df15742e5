// The sums of the direct gather (direct.h): terms of one row of the target, in registers.
#pragma once

#include "microkernel.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// A packed row, and where the weights of its channel and kernel row are.
template <class T>
struct PackedRow {
  const T* elements;
  int64_t weights;
};

// The taps of one column phase over the packed rows that a row of the target reads.
template <class T>
struct RowSum {
  const PackedRow<T>* packed;  // [rows]
  int64_t rows;
  const T* weights;
  const int64_t* start;  // [taps] where in a packed row the tap begins
  int64_t taps;
};

template <class T>
inline bool any_lane(const Bits<T>& lanes) {
  const Vector<int64_t> words = reinterpret_cast<Vector<int64_t>>(lanes);
  int64_t any = 0;
  for (int i = 0; i < kLanes<int64_t>; ++i) any |= words[i];
  return any != 0;
}

// sum[v] += sum over rows and taps of weight * packed[row][start[tap] + i + v * kLanes ...]
template <int Vectors, class T>
DECONV_INLINE void add_terms(const RowSum<T>& r, int64_t i, Vector<T>* sum) {
  constexpr int kN = kLanes<T>;
  for (const PackedRow<T>*row = r.packed, *const end = row + r.rows; row != end; ++row) {
    const T *packed = row->elements + i, *weights = r.weights + row->weights;
    for (int64_t tap = 0; tap < r.taps; ++tap) {
      const T weight = weights[tap];
      const T* source = packed + r.start[tap];
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * load_vector(source + v * kN);
    }
  }
}

// sums[i] (+)= the same, i < Vectors * kLanes. Lanes of `broken` are not zero where a sum became
// NaN.
template <int Vectors, class T>
inline void sum_row_vectors(const RowSum<T>& r, int64_t i, T* sums, bool accumulate,
                            Bits<T>& broken) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) sum[v] = Vector<T>{};
  add_terms<Vectors>(r, i, sum);
  for (int v = 0; v < Vectors; ++v) {
    if (accumulate) sum[v] += load_vector(sums + i + v * kN);
    broken |= sum[v] != sum[v];
    store_vector(sums + i + v * kN, sum[v]);
  }
}

// The same for whole vectors that cover `length` positions, in two levels, as everywhere
// (microkernel.h).
template <class T>
DECONV_PHASE void sum_rows(RowSum<T> r, int64_t length, T* sums, bool accumulate,
                           Bits<T>& all_broken) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken = all_broken;
  const int64_t all = r.rows;
  const int64_t at_once = all * r.taps <= kPartialSum ? max_of<int64_t>(1, all)
                                                      : max_of<int64_t>(1, kPartialSum / r.taps);
  for (int64_t first = 0; first == 0 || first < all; first += at_once, r.packed += at_once) {
    r.rows = min_of(at_once, all - first);
    int64_t i = 0;
    for (; i + 7 * kN < length; i += 8 * kN) sum_row_vectors<8>(r, i, sums, accumulate, broken);
    for (; i + 3 * kN < length; i += 4 * kN) sum_row_vectors<4>(r, i, sums, accumulate, broken);
    for (; i < length; i += kN) sum_row_vectors<1>(r, i, sums, accumulate, broken);
    accumulate = true;
  }
  all_broken = broken;
}

// to[i * Step + p] = bias + sum of phase p at position i, for the first `size` elements: phases
// join in registers, and nothing is stored twice. For sums that need no second level. Whether one
// became NaN.
template <int Step, class S, class T>
DECONV_PHASE bool sum_rows_in_place(const RowSum<T>* phases, S* to, int64_t size, T bias) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken{};
  int64_t i = 0;
  const auto sum_some = [&](auto vectors, const auto& store) DECONV_INLINED {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<T> sum[Step * kVectors];
    for (int v = 0; v < Step * kVectors; ++v) sum[v] = Vector<T>{};
    for (int p = 0; p < Step; ++p) add_terms<kVectors>(phases[p], i, sum + p * kVectors);
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> joined[Step];
      for (int p = 0; p < Step; ++p) {
        joined[p] = sum[p * kVectors + v];
        broken |= joined[p] != joined[p];
        joined[p] += bias;
      }
      join_residues<T, Step>(joined);
      for (int p = 0; p < Step; ++p) store((i + v * kN) * Step + p * kN, joined[p]);
    }
    i += kVectors * kN;
  };
  const auto whole = [&](int64_t at, Vector<T> v) DECONV_INLINED { store_as(to + at, v); };
  constexpr int kMany = 8 / Step, kSome = 4 / Step;
  while ((i + kMany * kN) * Step <= size) sum_some(Number<kMany>{}, whole);
  while ((i + kSome * kN) * Step <= size) sum_some(Number<kSome>{}, whole);
  while ((i + kN) * Step <= size) sum_some(Number<1>{}, whole);
  if (i * Step < size)
    sum_some(Number<1>{}, [&](int64_t at, Vector<T> v) DECONV_INLINED {
      if (at < size) store_first_as(to + at, v, min_of<int64_t>(kN, size - at));
    });
  return any_lane<T>(broken);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
