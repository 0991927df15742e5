// The sums of the direct gather (direct.h): terms of a row of some planes of the target, in
// registers.
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
  int64_t weight_pitch;  // from the weights of a plane of the target to those of the next
};

// sum[p * Vectors + v] = terms [begin, end) of plane p at positions i + v * kLanes ...; `source` is
// that of position i. Planes share what is loaded.
template <int Planes, int Vectors, class T>
DECONV_INLINE void sum_part(const Terms<T>& terms, int64_t begin, int64_t end, const T* source,
                            Vector<T>* sum) {
  unroll<Planes * Vectors>([&](auto i) DECONV_INLINED { sum[i] = Vector<T>{}; });
  for (int64_t k = begin; k < end; ++k) {
    const T* weight = terms.weight + k;
    const T* from = source + terms.place[k];
    Vector<T> factor[Vectors];
    unroll<Vectors>([&](auto v) DECONV_INLINED { factor[v] = load_vector(from + v * kLanes<T>); });
    unroll<Planes * Vectors>([&](auto i) DECONV_INLINED {
      sum[i] += weight[i / Vectors * terms.weight_pitch] * factor[i % Vectors];
    });
  }
}

// All terms, in two levels, as everywhere (microkernel.h).
template <int Planes, int Vectors, class T>
DECONV_INLINE void sum_terms(const Terms<T>& terms, const T* source, Vector<T>* sum) {
  int64_t end = min_of(terms.count, kPartialSum);
  sum_part<Planes, Vectors>(terms, 0, end, source, sum);
  while (end < terms.count) {
    const int64_t begin = end;
    end = min_of(terms.count, begin + kPartialSum);
    Vector<T> part[Planes * Vectors];
    sum_part<Planes, Vectors>(terms, begin, end, source, part);
    unroll<Planes * Vectors>([&](auto i) DECONV_INLINED { sum[i] += part[i]; });
  }
}

// sums[i] (+)= the terms, for whole vectors that cover `length` positions. Lanes of `all_broken`
// are not zero where a sum became NaN.
template <class T>
DECONV_PHASE void sum_rows(const Terms<T>& terms, const T* source, int64_t length, T* sums,
                           bool accumulate, Bits<T>& all_broken) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken = all_broken;
  int64_t i = 0;
  const auto sum_some = [&](auto vectors) DECONV_INLINED {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<T> sum[kVectors];
    sum_terms<1, kVectors>(terms, source + i, sum);
    unroll<kVectors>([&](auto v) DECONV_INLINED {
      T* to = sums + i + v * kN;
      if (accumulate) sum[v] += load_vector(to);
      broken |= sum[v] != sum[v];
      store_vector(to, sum[v]);
    });
    i += kVectors * kN;
  };
  while (i + 7 * kN < length) sum_some(Number<8>{});
  while (i + 3 * kN < length) sum_some(Number<4>{});
  while (i < length) sum_some(Number<1>{});
  all_broken = broken;
}

// Rows of the target that have the same terms, in planes that have the same places.
template <class S, class T>
struct EqualRows {
  int64_t count;
  const T* source;  // of the first of them
  int64_t source_pitch;
  S* to;
  int64_t to_pitch, plane_pitch;
  int64_t size;   // elements of a row
  const T* bias;  // [planes]
  bool streams;   // past the caches
};

// Vectors of sums that hide the latency of a multiply-add, and how many more fit the registers.
constexpr int kSumVectors = 8, kMostSumVectors = kRegisters / 4 * 3;

// to[plane][i * Step + r] = bias + sum of phase r at position i, in all rows: phases join in
// registers, and nothing is stored twice. Whether a sum became NaN.
template <int Step, int Planes, class S, class T>
DECONV_PHASE bool sum_rows_in_place(const Terms<T>* phases, const EqualRows<S, T>& rows) {
  constexpr int kN = kLanes<T>;
  Bits<T> broken{};
  const T* source = rows.source;
  S* to = rows.to;
  T bias[Planes];  // where no store can change it
  for (int p = 0; p < Planes; ++p) bias[p] = rows.bias[p];
  // Lines of several planes in turns would be written in parts.
  const bool streams =
      Planes == 1 && rows.streams && streamable<T>(to) && streamable<T>(to + rows.to_pitch);
  int64_t i;
  const auto sum_some = [&](auto vectors, const auto& store) DECONV_INLINED {
    constexpr int kVectors = decltype(vectors)::value;
    Vector<T> sum[Step][Planes * kVectors];
    unroll<Step>(
        [&](auto r) DECONV_INLINED { sum_terms<Planes, kVectors>(phases[r], source + i, sum[r]); });
    unroll<Planes * kVectors>([&](auto at) DECONV_INLINED {
      constexpr int kPlane = at / kVectors, kVector = at % kVectors;
      Vector<T> joined[Step];
      unroll<Step>([&](auto r) DECONV_INLINED {
        broken |= sum[r][at] != sum[r][at];
        joined[r] = sum[r][at] + bias[kPlane];
      });
      join_residues<T, Step>(joined);
      unroll<Step>([&](auto r) DECONV_INLINED {
        store(kPlane, (i + kVector * kN) * Step + r * kN, joined[r]);
      });
    });
    i += kVectors * kN;
  };
  const auto whole = [&](int plane, int64_t at, Vector<T> v) DECONV_INLINED {
    S* here = to + plane * rows.plane_pitch + at;
    streams ? stream_as(here, v) : store_as(here, v);
  };
  // Planes that share loads are worth the registers of a phase; the phases before it wait in
  // memory.
  constexpr int kMost = Planes == 1 ? kSumVectors / Step
                        : Step == 1 ? kMostSumVectors / Planes
                                    : kSumVectors / Planes;
  constexpr int kSome = (kMost + 1) / 2;
  constexpr int kFew = Planes > 1 && kSome > 2 ? 2 : 1;
  const int64_t size = rows.size, all = size / (Step * kN);
  for (int64_t row = 0; row < rows.count; ++row) {
    i = 0;
    int64_t left = all;
    for (; left >= kMost && left != kMost + 1; left -= kMost) sum_some(Number<kMost>{}, whole);
    for (; left >= kSome; left -= kSome) sum_some(Number<kSome>{}, whole);
    for (; left >= kFew; left -= kFew) sum_some(Number<kFew>{}, whole);
    for (; left > 0; --left) sum_some(Number<1>{}, whole);
    if (i * Step < size)
      sum_some(Number<1>{}, [&](int plane, int64_t at, Vector<T> v) DECONV_INLINED {
        if (at < size)
          store_first_as(to + plane * rows.plane_pitch + at, v, min_of<int64_t>(kN, size - at));
      });
    source += rows.source_pitch;
    to += rows.to_pitch;
  }
  return any_lane<T>(broken);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
