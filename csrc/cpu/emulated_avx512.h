// The instructions of AVX-512 and AMX that isa_avx512.cpp uses, in AVX2: so that its kernels can be
// tested on a processor without them. Nothing of this is in a binary that is not asked for it:
//
//     CXX=./emulating DECONV_EXT_CACHE=emulated python -m deconv_ext build
//
// where the script `emulating` is: exec g++ -DDECONV_EMULATED "$@"
//
// The compiler itself takes vectors of 64 bytes apart; here is what names an instruction. Results
// are those of the instructions, bit by bit but for the order of sums within a tile product.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "../half.h"

namespace deconv {
namespace cpu {
namespace emulated {

// f(half of a, half of b, ...) for both halves of 64-byte vectors.
template <class V, class Half, class F, class... Args>
inline V by_halves(const F& f, const Args&... args) {
  V result;
  for (int h = 0; h < 2; ++h) {
    const Half half = f(reinterpret_cast<const Half*>(&args)[h]...);
    std::memcpy(reinterpret_cast<char*>(&result) + 32 * h, &half, 32);
  }
  return result;
}

inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return by_halves<__m512, __m256>(
      [](__m256 x, __m256 y, __m256 z) { return _mm256_fmadd_ps(x, y, z); }, a, b, c);
}
inline __m512d fmadd_pd(__m512d a, __m512d b, __m512d c) {
  return by_halves<__m512d, __m256d>(
      [](__m256d x, __m256d y, __m256d z) { return _mm256_fmadd_pd(x, y, z); }, a, b, c);
}
inline __m512 fmsub_ps(__m512 a, __m512 b, __m512 c) { return fmadd_ps(a, b, -c); }
inline __m512d fmsub_pd(__m512d a, __m512d b, __m512d c) { return fmadd_pd(a, b, -c); }

inline __m512i cvtepu16_epi32(__m256i v) {
  const __m256i halves[] = {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1))};
  __m512i result;
  std::memcpy(&result, halves, sizeof(result));
  return result;
}
inline __m512 cvtph_ps(__m256i v) {
  const __m256 halves[] = {_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                           _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1))};
  __m512 result;
  std::memcpy(&result, halves, sizeof(result));
  return result;
}
inline __m256i cvtps_ph(__m512 v, int) {
  __m256 halves[2];
  std::memcpy(halves, &v, sizeof(v));
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}
inline __m512i slli_epi32(__m512i v, int bits) {
  return by_halves<__m512i, __m256i>([&](__m256i x) { return _mm256_slli_epi32(x, bits); }, v);
}
inline __m512i or_si512(__m512i a, __m512i b) { return a | b; }

// Elements whose bit is not set are not touched, and count as zero.
template <class T, class V>
inline V masked_load(uint64_t mask, const void* p) {
  T lanes[sizeof(V) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1) std::memcpy(lanes + i, static_cast<const T*>(p) + i, sizeof(T));
  V v;
  std::memcpy(&v, lanes, sizeof(v));
  return v;
}
template <class T, class V>
inline void masked_store(void* p, uint64_t mask, V v) {
  for (size_t i = 0; i < sizeof(V) / sizeof(T); ++i)
    if (mask >> i & 1)
      std::memcpy(static_cast<T*>(p) + i, reinterpret_cast<const char*>(&v) + i * sizeof(T),
                  sizeof(T));
}

inline uint8_t test_epi64(__m512i a, __m512i b) {
  uint64_t words[8];
  const __m512i both = a & b;
  std::memcpy(words, &both, sizeof(both));
  int mask = 0;
  for (int i = 0; i < 8; ++i) mask |= (words[i] != 0) << i;
  return static_cast<uint8_t>(mask);
}

inline void stream_si512(void* p, __m512i v) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // as the processor does
  __m256i halves[2];
  std::memcpy(halves, &v, sizeof(v));
  _mm256_stream_si256(static_cast<__m256i*>(p), halves[0]);
  _mm256_stream_si256(static_cast<__m256i*>(p) + 1, halves[1]);
}

// Tile registers, all of 16 rows of 16 pairs or floats. Empty, as NaN, where a thread has not
// shaped them.
struct Tiles {
  float at[8][16][16];
  bool shaped = false;
};
inline Tiles& tiles() {
  static thread_local Tiles all;
  return all;
}
struct TileSession {
  TileSession() {
    std::memset(tiles().at, 0xff, sizeof(tiles().at));
    tiles().shaped = true;
  }
  ~TileSession() { tiles().shaped = false; }
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};
using TileRows = float[16][16];
inline TileRows& tile(int index) {
  if (!tiles().shaped) __builtin_trap();  // as the processor does
  return tiles().at[index];
}
// Rows are so many bytes apart.
inline void load_tile(int index, const void* p, int64_t pitch) {
  for (int i = 0; i < 16; ++i)
    std::memcpy(tile(index)[i], static_cast<const char*>(p) + i * pitch, 64);
}
inline void store_tile(int index, void* p, int64_t pitch) {
  for (int i = 0; i < 16; ++i) std::memcpy(static_cast<char*>(p) + i * pitch, tile(index)[i], 64);
}
inline void clear_tile(int index) { std::memset(tile(index), 0, 16 * 64); }

// An operand: the odd or even bfloat16 of a pair, zero if it is denormal.
inline float operand(float pair, bool odd) {
  uint32_t bits;
  std::memcpy(&bits, &pair, 4);
  bits = odd ? bits & 0xffff0000u : bits << 16;
  if (!(bits & 0x7f800000u)) bits &= 0x80000000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline void multiply_tiles(int c, int a, int b) {
  TileRows &sums = tile(c), &left = tile(a), &right = tile(b);
  for (int k = 0; k < 16; ++k)
    for (bool odd : {false, true})
      for (int m = 0; m < 16; ++m) {
        const float factor = operand(left[m][k], odd);
        for (int n = 0; n < 16; ++n) sums[m][n] += factor * operand(right[k][n], odd);
      }
}
inline __m512 dpbf16_ps(__m512 sum, __m512 a, __m512 b) {
  for (bool odd : {true, false})
    for (int i = 0; i < 16; ++i)
      sum[i] = __builtin_fmaf(operand(a[i], odd), operand(b[i], odd), sum[i]);
  return sum;
}

}  // namespace emulated
}  // namespace cpu
}  // namespace deconv

#define _mm512_fmsub_ps deconv::cpu::emulated::fmsub_ps
#define _mm512_fmsub_pd deconv::cpu::emulated::fmsub_pd
#define _mm512_cvtepu16_epi32 deconv::cpu::emulated::cvtepu16_epi32
#define _mm512_cvtph_ps deconv::cpu::emulated::cvtph_ps
#define _mm512_cvtps_ph deconv::cpu::emulated::cvtps_ph
#define _mm512_slli_epi32 deconv::cpu::emulated::slli_epi32
#define _mm512_or_si512 deconv::cpu::emulated::or_si512
#define _mm512_stream_si512 deconv::cpu::emulated::stream_si512
#define _mm512_test_epi64_mask (deconv::cpu::emulated::test_epi64)
#define _mm512_maskz_loadu_epi32 (deconv::cpu::emulated::masked_load<uint32_t, __m512i>)
#define _mm512_maskz_loadu_epi64 (deconv::cpu::emulated::masked_load<uint64_t, __m512i>)
#define _mm512_maskz_loadu_epi16 (deconv::cpu::emulated::masked_load<uint16_t, __m512i>)
#define _mm256_maskz_loadu_epi16 (deconv::cpu::emulated::masked_load<uint16_t, __m256i>)
#define _mm512_mask_storeu_epi32 (deconv::cpu::emulated::masked_store<uint32_t, __m512i>)
#define _mm512_mask_storeu_epi64 (deconv::cpu::emulated::masked_store<uint64_t, __m512i>)
#define _mm256_mask_storeu_epi16 (deconv::cpu::emulated::masked_store<uint16_t, __m256i>)
