// bfloat16 in pairs of channels, what dot-product instructions multiply. A pair travels as the bits
// of a float, so that everything that packs floats packs pairs too. Where channels lie next to each
// other in memory, floats can be read there as they are; else PairRows makes them of two rows.
#pragma once

#include "simd.h"

namespace deconv {

struct ChannelPair {
  BFloat16 even, odd;
};
template <>
inline float convert<float, ChannelPair>(ChannelPair pair) {
  return bit_cast<float>(pair);
}

namespace cpu {
namespace DECONV_ISA {

// Two rows of bfloat16, `odd` apart, read as one row of pairs.
struct PairRows {
  const BFloat16* even;
  int64_t odd;

  PairRows operator+(int64_t i) const { return {even + i, odd}; }
  ChannelPair operator[](int64_t i) const { return {even[i], even[i + odd]}; }
};

inline void prefetch(PairRows p) {
  prefetch(p.even);
  prefetch(p.even + p.odd);
}

inline Vector<float> pair_up(__m256i even, __m256i odd) {
  return reinterpret_cast<Vector<float>>(_mm512_or_si512(
      _mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
}

template <class T>
inline Vector<T> load_as(PairRows p) {
  return pair_up(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.even)),
                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p.even + p.odd)));
}

template <class T>
inline Vector<T> load_first(PairRows p, int64_t count) {
  const __mmask16 mask = (1u << count) - 1;
  return pair_up(_mm256_maskz_loadu_epi16(mask, p.even),
                 _mm256_maskz_loadu_epi16(mask, p.even + p.odd));
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
