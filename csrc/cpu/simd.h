// Vectors as the compiler's vector extension: one source for every instruction set. The file that
// includes this (isa_*.cpp) has set DECONV_ISA, the namespace of everything compiled for it, and
// DECONV_VECTOR_BYTES, after switching the compiler's target.
//
// No include guard across ISAs is needed: each isa_*.cpp is one translation unit. Nothing from the
// standard library may be instantiated in here, or the linker could keep the copy made for the
// wrong instruction set.
#pragma once

#if DECONV_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "../half.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

constexpr int kVectorBytes = DECONV_VECTOR_BYTES;
constexpr int kRegisters = DECONV_VECTOR_REGISTERS;

// Phases of a kernel keep their names in a profile.
#define DECONV_PHASE __attribute__((noinline))
// What takes vectors in memory, which inlining keeps in registers.
#define DECONV_INLINE inline __attribute__((always_inline))

// f(0), ..., f(Count - 1), where the numbers are constants: arrays that they index stay in
// registers. f is to be inlined (DECONV_INLINED behind its parameters).
template <int N>
struct Number {
  static constexpr int value = N;
  constexpr operator int() const { return N; }
};
#define DECONV_INLINED __attribute__((always_inline))
template <int Count, class F>
DECONV_INLINE void unroll(const F& f) {
  if constexpr (Count > 0) {
    unroll<Count - 1>(f);
    f(Number<Count - 1>{});
  }
}

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

struct Range {
  int64_t begin, end;
};

template <class I>
inline I min_of(I a, I b) {
  return a < b ? a : b;
}
template <class I>
inline I max_of(I a, I b) {
  return a > b ? a : b;
}
template <class I>
inline I round_up(I value, I multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
  typedef T unaligned __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
inline Vector<T> broadcast(T v) {
  return v - Vector<T>{};  // v + 0 would take an addition, for the sake of -0
}

template <class T>
inline Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <class T>
inline void store_vector(T* p, Vector<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}

// The compiler takes it for changed here, so what follows from it is computed here.
DECONV_INLINE void keep_in_register(int64_t& v) { asm("" : "+r"(v)); }

// sum += a * b, rounded once where the ISA can. As an instruction that only writes its sum: left to
// itself, the compiler lets sums change places with factors, and moves them back after each step.
template <class T>
DECONV_INLINE void multiply_add(Vector<T>& sum, Vector<T> a, Vector<T> b) {
#if DECONV_VECTOR_BYTES == 64 && defined(DECONV_EMULATED)
  if constexpr (sizeof(T) == 4) {
    sum = emulated::fmadd_ps(a, b, sum);
  } else {
    sum = emulated::fmadd_pd(a, b, sum);
  }
#elif DECONV_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
#else
  sum += a * b;
#endif
}

// The same with one number for all lanes, by the instruction that loads it, too, where there is
// one.
template <class T>
DECONV_INLINE void multiply_add(Vector<T>& sum, const T* a, Vector<T> b) {
#if DECONV_VECTOR_BYTES == 64 && !defined(DECONV_EMULATED)
  if constexpr (sizeof(T) == 4) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  } else {
    asm("vfmadd231pd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
  }
#else
  multiply_add<T>(sum, broadcast(*a), b);
#endif
}

// As many 16-bit elements as float32 lanes, exactly widened: float16 by its instruction where there
// is one.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<float> widen(HalfWords v, BFloat16) {
  // One instruction, of which the compiler makes three.
#if DECONV_VECTOR_BYTES == 64
  const __m512i words = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v));
#elif DECONV_VECTOR_BYTES == 32
  const __m256i words = _mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v));
#else
  const Vector<uint32_t> words = __builtin_convertvector(v, Vector<uint32_t>);
#endif
  return reinterpret_cast<Vector<float>>(reinterpret_cast<Vector<uint32_t>>(words) << 16);
}
inline Vector<float> widen(HalfWords v, Float16) {
#if DECONV_VECTOR_BYTES == 64
  return reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(v)));
#elif DECONV_VECTOR_BYTES == 32
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(v)));
#else
  float lanes[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) lanes[i] = convert<float>(Float16{v[i]});
  return load_vector(lanes);
#endif
}

// One vector of T from consecutive elements of the storage type.
template <class T, class S>
inline Vector<T> load_as(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load_vector(p);
  } else {
    HalfWords words;
    __builtin_memcpy(&words, p, sizeof(words));
    return widen(words, S{});
  }
}

// Float32 rounded to 16-bit storage, to the nearest, ties to even. A NaN stays one.
// The upper halves of the words are the result, the lower ones anything.
inline Vector<uint32_t> round_bfloat16(Vector<float> v) {
  typedef Vector<uint32_t> Words;
  const Words bits = reinterpret_cast<Words>(v);
  return v == v ? bits + (0x7fff + (bits >> 16 & 1)) : bits | 0x400000;
}
inline HalfWords narrow(Vector<float> v, BFloat16) {
  return __builtin_convertvector(round_bfloat16(v) >> 16, HalfWords);
}
inline HalfWords narrow(Vector<float> v, Float16) {
#if DECONV_VECTOR_BYTES == 64
  return reinterpret_cast<HalfWords>(
      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif DECONV_VECTOR_BYTES == 32
  return reinterpret_cast<HalfWords>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  HalfWords words;
  for (int i = 0; i < kLanes<float>; ++i) words[i] = convert<Float16>(v[i]).bits;
  return words;
#endif
}

// A vector of T to consecutive elements of the storage type.
template <class S, class V>
inline void store_as(S* p, V v) {
  if constexpr (sizeof(S) == 2) {
    const HalfWords words = narrow(v, S{});
    __builtin_memcpy(p, &words, sizeof(words));
  } else {
    store_vector<S>(p, v);
  }
}

// The same, past the caches (output_pool.h says when); p has to be `streamable`. Lines are
// collected until they are full, so those of one place should be written one after another.
template <class S, class V>
inline void stream_as(S* p, V v) {
#if DECONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 2) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(narrow(v, S{})));
  } else {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
  }
#elif DECONV_VECTOR_BYTES == 32
  if constexpr (sizeof(S) == 2) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(narrow(v, S{})));
  } else {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
  }
#else
  store_as(p, v);
#endif
}
// Whether a vector from p on, rounded to the storage type, is aligned.
template <class T, class S>
inline bool streamable(const S* p) {
  return reinterpret_cast<uintptr_t>(p) % (kLanes<T> * sizeof(S)) == 0;
}
// Before other threads read what was streamed.
inline void end_streams() {
#if DECONV_VECTOR_BYTES >= 32
  _mm_sfence();
#endif
}

// Integer lanes of the same width: the type of a shuffle's mask.
template <int Bytes>
struct IntegerOf;
template <>
struct IntegerOf<4> {
  typedef int32_t type;
};
template <>
struct IntegerOf<8> {
  typedef int64_t type;
};
// What a vector is to the instructions that take bits, a mask for instance.
template <class T>
using Bits = Vector<typename IntegerOf<sizeof(T)>::type>;

// Whether a lane is not zero.
template <class T>
inline bool any_lane(const Bits<T>& lanes) {
#if DECONV_VECTOR_BYTES == 64
  const __m512i words = reinterpret_cast<__m512i>(lanes);
  return _mm512_test_epi64_mask(words, words) != 0;
#elif DECONV_VECTOR_BYTES == 32
  const __m256i words = reinterpret_cast<__m256i>(lanes);
  return !_mm256_testz_si256(words, words);
#else
  const Vector<int64_t> words = reinterpret_cast<Vector<int64_t>>(lanes);
  int64_t any = 0;
  for (int i = 0; i < kLanes<int64_t>; ++i) any |= words[i];
  return any != 0;
#endif
}

// The even lanes of a followed by b, or the odd ones.
template <class T, bool Odd>
inline Vector<T> alternate_lanes(Vector<T> a, Vector<T> b) {
#if DECONV_VECTOR_BYTES == 32
  // Within halves, then the pairs to their places: the compiler needs one instruction more.
  if constexpr (sizeof(T) == 4) {
    const __m256 pairs = _mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b),
                                           Odd ? 0xdd : 0x88);
    return reinterpret_cast<Vector<T>>(
        _mm256_permute4x64_pd(reinterpret_cast<__m256d>(pairs), 0xd8));
  }
#endif
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  for (int i = 0; i < kLanes<T>; ++i) mask[i] = static_cast<Index>(2 * i + Odd);
  return __builtin_shuffle(a, b, mask);
}
template <class T>
inline Vector<T> even_lanes(Vector<T> a, Vector<T> b) {
  return alternate_lanes<T, false>(a, b);
}
template <class T>
inline Vector<T> odd_lanes(Vector<T> a, Vector<T> b) {
  return alternate_lanes<T, true>(a, b);
}

// The first `count` of 16-bit elements, at most half of an AVX2 register: a call of memcpy would
// cost more.
inline void copy_first(void* to, const void* from, int64_t count) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  const auto copy = [&](auto bytes) DECONV_INLINED {
    if (!(2 * count & bytes)) return;
    __builtin_memcpy(t, f, bytes);
    t += bytes;
    f += bytes;
  };
  copy(Number<16>{});
  copy(Number<8>{});
  copy(Number<4>{});
  copy(Number<2>{});
}

// The first `count` lanes, 0 <= count <= kLanes: memory beyond them is not touched, lanes beyond
// them are zero.
template <class T, class S>
inline Vector<T> load_first(const S* p, int64_t count) {
#if DECONV_VECTOR_BYTES == 64
  if constexpr (sizeof(S) == 4)
    return reinterpret_cast<Vector<T>>(_mm512_maskz_loadu_epi32((1u << count) - 1, p));
  if constexpr (sizeof(S) == 8)
    return reinterpret_cast<Vector<T>>(_mm512_maskz_loadu_epi64((1u << count) - 1, p));
#elif DECONV_VECTOR_BYTES == 32
  alignas(32) static constexpr int32_t kMask[] = {-1, -1, -1, -1, -1, -1, -1, -1,
                                                  0,  0,  0,  0,  0,  0,  0,  0};
  const auto mask = [&](int64_t words) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - words));
  };
  if constexpr (sizeof(S) == 4)
    return reinterpret_cast<Vector<T>>(
        _mm256_maskload_epi32(reinterpret_cast<const int*>(p), mask(count)));
  if constexpr (sizeof(S) == 8)
    return reinterpret_cast<Vector<T>>(
        _mm256_maskload_epi64(reinterpret_cast<const long long*>(p), mask(2 * count)));
#endif
  if constexpr (sizeof(S) == 2) {
    HalfWords words{};
#if DECONV_VECTOR_BYTES == 64
    words = reinterpret_cast<HalfWords>(_mm256_maskz_loadu_epi16((1u << count) - 1, p));
#else
    copy_first(&words, p, count);
#endif
    return widen(words, S{});
  }
  T lanes[kLanes<T>] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = convert<T>(p[i]);
  return load_vector(lanes);
}

template <class T>
inline void store_first(T* p, Vector<T> v, int64_t count) {
#if DECONV_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return _mm512_mask_storeu_epi32(p, (1u << count) - 1, reinterpret_cast<__m512i>(v));
  if constexpr (sizeof(T) == 8)
    return _mm512_mask_storeu_epi64(p, (1u << count) - 1, reinterpret_cast<__m512i>(v));
#elif DECONV_VECTOR_BYTES == 32
  // Halves of halves: masked stores are slow on some processors.
  if (count == kLanes<T>) return store_vector(p, v);
  const __m256i whole = reinterpret_cast<__m256i>(v);
  __m128i half = _mm256_castsi256_si128(whole);
  const int64_t words = count * static_cast<int64_t>(sizeof(T) / 4);
  char* to = reinterpret_cast<char*>(p);
  if (words & 4) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), half);
    half = _mm256_extracti128_si256(whole, 1);
    to += 16;
  }
  if (words & 2) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), half);
    half = _mm_unpackhi_epi64(half, half);
    to += 8;
  }
  if (words & 1) _mm_storeu_si32(to, half);
#else
  for (int64_t i = 0; i < count; ++i) p[i] = v[i];
#endif
}

// The first `count` lanes, rounded to the storage type.
template <class S, class V>
inline void store_first_as(S* p, V v, int64_t count) {
  if constexpr (sizeof(S) == 2) {
    const HalfWords words = narrow(v, S{});
#if DECONV_VECTOR_BYTES == 64
    _mm256_mask_storeu_epi16(p, (1u << count) - 1, reinterpret_cast<__m256i>(words));
#else
    copy_first(p, &words, count);
#endif
  } else {
    store_first<S>(p, v, count);
  }
}

template <class S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p);
  // Without this, GCC takes a function that does nothing but prefetch for one without effect.
  asm volatile("");
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
