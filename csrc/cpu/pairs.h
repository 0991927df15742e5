// bfloat16 in pairs, of channels for instance, what dot-product instructions multiply. A pair
// travels as the bits of a float, so that everything that packs floats packs pairs too. Where
// channels lie next to each other in memory, floats can be read there as they are; else PairRows
// makes them of two rows.
#pragma once

#include "simd.h"

namespace deconv {

struct Pair {
  BFloat16 even, odd;
};
template <>
inline float convert<float, Pair>(Pair pair) {
  return bit_cast<float>(pair);
}

namespace cpu {
namespace DECONV_ISA {

// Two rows of bfloat16, `odd` apart, read as one row of pairs.
struct PairRows {
  const BFloat16* even;
  int64_t odd;
  uint32_t mask = ~uint32_t{0};  // the halves that are read; others are zero

  PairRows operator+(int64_t i) const { return {even + i, odd, mask}; }
  Pair operator[](int64_t i) const {
    return bit_cast<Pair>(bit_cast<uint32_t>(Pair{even[i], even[i + odd]}) & mask);
  }
};

// Without the row that does not exist, one of them at most.
inline PairRows of_pair(PairRows p, bool has_even, bool has_odd) {
  return {has_even ? p.even : p.even + p.odd, has_even && has_odd ? p.odd : 0,
          (has_even ? 0xffffu : 0u) | (has_odd ? 0xffff0000u : 0u)};
}

inline void prefetch(PairRows p) {
  prefetch(p.even);
  prefetch(p.even + p.odd);
}

inline Vector<float> pair_up(__m256i even, __m256i odd, uint32_t mask) {
  const __m512i pairs = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Vector<uint32_t>>(pairs) & mask);
}

template <class T>
inline Vector<T> load_as(PairRows p) {
  return pair_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.even)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.even + p.odd)), p.mask);
}

template <class T>
inline Vector<T> load_first(PairRows p, int64_t count) {
  const __mmask16 mask = (1u << count) - 1;
  return pair_up(_mm256_maskz_loadu_epi16(mask, p.even),
                 _mm256_maskz_loadu_epi16(mask, p.even + p.odd), p.mask);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
