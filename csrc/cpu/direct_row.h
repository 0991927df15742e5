// The sums of the direct gather (direct.h): terms of one row of the target, in registers.
#pragma once

#include "microkernel.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// sum over terms k of weight[k] * source[place[k] + i], for positions i
template <class T>
struct Terms {
  const T* weight;
  const int64_t* place;
  int64_t count;
};

template <class T>
inline bool any_lane(const Bits<T>& lanes) {
  const Vector<int64_t> words = reinterpret_cast<Vector<int64_t>>(lanes);
  int64_t any = 0;
  for (int i = 0; i < kLanes<int64_t>; ++i) any |= words[i];
  return any != 0;
}

// sum[v] += the terms at positions i + v * kLanes ...; `source` is that of position i
template <int Vectors, class T>
DECONV_INLINE void add_terms(const Terms<T>& terms, const T* source, Vector<T>* sum) {
  for (int64_t k = 0; k < terms.count; ++k) {
    const T weight = terms.weight[k];
    const T* from = source + terms.place[k];
    unroll<Vectors>([&](auto v)
                        DECONV_INLINED { sum[v] += weight * load_vector(from + v * kLanes<T>); });
  }
}

// sums[i] (+)= the terms, i < Vectors * kLanes. Lanes of `broken` are not zero where a sum became
// NaN.
template <int Vectors, class T>
inline void sum_row_vectors(const Terms<T>& terms, const T* source, T* sums, bool accumulate,
                            Bits<T>& broken) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) sum[v] = Vector<T>{};
  add_terms<Vectors>(terms, source, sum);
  for (int v = 0; v < Vectors; ++v) {
    if (accumulate) sum[v] += load_vector(sums + v * kN);
    broken |= sum[v] != sum[v];
    store_vector(sums + v * kN, sum[v]);
  }
}

// The same for whole vectors that cover `length` positions, in two levels, as everywhere
// (microkernel.h).
template <class T>
DECONV_PHASE void sum_rows(Terms<T> terms, const T* source, int64_t length, T* sums,
                           bool accumulate, Bits<T>& all_broken) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken = all_broken;
  int64_t left = terms.count;
  do {
    terms.count = min_of(left, kPartialSum);
    int64_t i = 0;
    const auto sum_some = [&](auto vectors) DECONV_INLINED {
      constexpr int kVectors = decltype(vectors)::value;
      sum_row_vectors<kVectors>(terms, source + i, sums + i, accumulate, broken);
      i += kVectors * kN;
    };
    while (i + 7 * kN < length) sum_some(Number<8>{});
    while (i + 3 * kN < length) sum_some(Number<4>{});
    while (i < length) sum_some(Number<1>{});
    accumulate = true;
    terms.weight += terms.count;
    terms.place += terms.count;
    left -= terms.count;
  } while (left > 0);
  all_broken = broken;
}

// Rows of the target that have the same terms.
template <class S, class T>
struct EqualRows {
  int64_t count;
  const T* source;  // of the first of them
  int64_t source_pitch;
  S* to;
  int64_t to_pitch;
  int64_t size;  // elements of a row
};

// to[i * Step + p] = bias + sum of phase p at position i, in all rows: phases join in registers,
// and nothing is stored twice. For sums that need no second level. Whether one became NaN.
template <int Step, class S, class T>
DECONV_PHASE bool sum_rows_in_place(const Terms<T>* phases, const EqualRows<S, T>& rows, T bias) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken{};
  const T* source = rows.source;
  S* to = rows.to;
  int64_t i;
  const auto sum_some = [&](auto vectors, const auto& store) DECONV_INLINED {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<T> sum[Step][kVectors];
    unroll<Step>([&](auto p) DECONV_INLINED {
      unroll<kVectors>([&](auto v) DECONV_INLINED { sum[p][v] = Vector<T>{}; });
      add_terms<kVectors>(phases[p], source + i, sum[p]);
    });
    unroll<kVectors>([&](auto v) DECONV_INLINED {
      Vector<T> joined[Step];
      unroll<Step>([&](auto p) DECONV_INLINED {
        broken |= sum[p][v] != sum[p][v];
        joined[p] = sum[p][v] + bias;
      });
      join_residues<T, Step>(joined);
      unroll<Step>([&](auto p) DECONV_INLINED { store((i + v * kN) * Step + p * kN, joined[p]); });
    });
    i += kVectors * kN;
  };
  const auto whole = [&](int64_t at, Vector<T> v) DECONV_INLINED { store_as(to + at, v); };
  constexpr int kMany = 8 / Step, kSome = 4 / Step;
  const int64_t size = rows.size;
  for (int64_t row = 0; row < rows.count; ++row) {
    i = 0;
    while ((i + kMany * kN) * Step <= size) sum_some(Number<kMany>{}, whole);
    while ((i + kSome * kN) * Step <= size) sum_some(Number<kSome>{}, whole);
    while ((i + kN) * Step <= size) sum_some(Number<1>{}, whole);
    if (i * Step < size)
      sum_some(Number<1>{}, [&](int64_t at, Vector<T> v) DECONV_INLINED {
        if (at < size) store_first_as(to + at, v, min_of<int64_t>(kN, size - at));
      });
    source += rows.source_pitch;
    to += rows.to_pitch;
  }
  return any_lane<T>(broken);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
