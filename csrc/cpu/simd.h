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
#if DECONV_VECTOR_BYTES >= 32
  if constexpr (sizeof(T) == 4) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  } else {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  }
#else
  sum += a * b;
#endif
}

// As many 16-bit elements as float32 lanes, exactly widened: float16 by its instruction where there
// is one.
typedef uint16_t HalfWords __attribute__((vector_size(kVectorBytes / 2)));

inline Vector<float> widen(HalfWords v, BFloat16) {
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(v, Vector<uint32_t>) << 16);
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

// Float32 rounded to 16-bit storage, to the nearest, ties to even.
#if DECONV_VECTOR_BYTES == 64
inline HalfWords narrow(Vector<float> v, Float16) {
  return reinterpret_cast<HalfWords>(
      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
inline HalfWords narrow(Vector<float> v, BFloat16) {
  const __m512i bits = reinterpret_cast<__m512i>(v), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(
      _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
  const __mmask16 nan =
      _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_UNORD_Q);
  return reinterpret_cast<HalfWords>(
      _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40))));
}
#else
template <class S>
inline HalfWords narrow(Vector<float> v, S) {
  HalfWords words;
  S stored[kLanes<float>];
  for (int i = 0; i < kLanes<float>; ++i) stored[i] = convert<S>(v[i]);
  __builtin_memcpy(&words, stored, sizeof(words));
  return words;
}
#endif

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

// The even lanes of a followed by b.
template <class T>
inline Vector<T> even_lanes(Vector<T> a, Vector<T> b) {
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  for (int i = 0; i < kLanes<T>; ++i) mask[i] = static_cast<Index>(2 * i);
  return __builtin_shuffle(a, b, mask);
}

// The odd lanes of a followed by b.
template <class T>
inline Vector<T> odd_lanes(Vector<T> a, Vector<T> b) {
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  for (int i = 0; i < kLanes<T>; ++i) mask[i] = static_cast<Index>(2 * i + 1);
  return __builtin_shuffle(a, b, mask);
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
    __builtin_memcpy(&words, p, count * sizeof(S));
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
    __builtin_memcpy(p, &words, count * sizeof(S));
#endif
  } else {
    store_first<S>(p, v, count);
  }
}

template <class S>
inline void prefetch(const S* p) {
  __builtin_prefetch(p);
}

// From here on P is a pointer to elements, or what reads as one (pairs.h).

// Every Stride-th of the elements from p on, Stride a power of two; all kLanes * Stride of them are
// there.
template <class T, int Stride, class P>
inline Vector<T> load_every(P p) {
  if constexpr (Stride == 1) {
    return load_as<T>(p);
  } else {
    return even_lanes<T>(load_every<T, Stride / 2>(p),
                         load_every<T, Stride / 2>(p + kLanes<T> * Stride / 2));
  }
}

// The same where `count` elements are there; lanes without one are zero.
template <class T, int Stride, class P>
inline Vector<T> load_every(P p, int64_t count) {
  constexpr int64_t kHalf = kLanes<T> * Stride / 2;
  if constexpr (Stride == 1) {
    return count >= kLanes<T> ? load_as<T>(p) : load_first<T>(p, count);
  } else if (count > kHalf) {
    return even_lanes<T>(load_every<T, Stride / 2>(p, count),
                         load_every<T, Stride / 2>(p + kHalf, count - kHalf));
  } else {
    return even_lanes<T>(load_every<T, Stride / 2>(p, count), Vector<T>{});
  }
}

template <class T>
inline void clear(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

// A loop over vectors would become a call of memcpy, which costs more than the few there are.
template <class T>
inline void copy_vectors(T* to, const T* from, int64_t vectors) {
  constexpr int64_t kN = kLanes<T>;
  const Vector<T> v0 = load_vector(from), v1 = load_vector(from + (vectors > 1 ? kN : 0));
  store_vector(to, v0);
  if (vectors > 1) store_vector(to + kN, v1);
  if (vectors > 2) store_vector(to + 2 * kN, load_vector(from + 2 * kN));
  if (vectors > 3) store_vector(to + 3 * kN, load_vector(from + 3 * kN));
}

// to[i] = from[i * Stride], i < count. Up to the end of a vector zeros may be written too, where
// `room` allows it: that is faster than a part of a vector.
template <int Stride, class T, class P>
inline void copy_every(T* to, P from, int64_t count, int64_t room) {
  constexpr int64_t kN = kLanes<T>;
  int64_t i = 0;
  for (; (count - i - 1) * Stride + 1 >= kN * Stride; i += kN)
    store_vector(to + i, load_every<T, Stride>(from + i * Stride));
  for (; i < count; i += kN) {
    const int64_t left = count - i;
    const Vector<T> v = load_every<T, Stride>(from + i * Stride, (left - 1) * Stride + 1);
    if (room - i >= kN) {
      store_vector(to + i, v);
    } else {
      store_first(to + i, v, min_of(left, kN));
    }
  }
}

// The same for any stride.
template <class T, class P>
inline void copy_strided(T* to, P from, int64_t stride, int64_t count, int64_t room) {
  switch (stride) {
    case 1:
      return copy_every<1>(to, from, count, room);
    case 2:
      return copy_every<2>(to, from, count, room);
    case 4:
      return copy_every<4>(to, from, count, room);
    case 8:
      return copy_every<8>(to, from, count, room);
  }
  for (int64_t i = 0; i < count; ++i) to[i] = convert<T>(from[i * stride]);
}
template <class T, class P>
inline void copy_strided(T* to, P from, int64_t stride, int64_t count) {
  copy_strided(to, from, stride, count, count);
}

// v[r] becomes every Stride-th element, from the r-th on, of what v[0], v[1], ... held in a row.
template <class T, int Stride>
DECONV_INLINE void split_residues(Vector<T>* v) {
  if constexpr (Stride > 1) {
    constexpr int kHalf = Stride / 2;
    Vector<T> even[kHalf], odd[kHalf];
    for (int i = 0; i < kHalf; ++i) {
      even[i] = even_lanes<T>(v[2 * i], v[2 * i + 1]);
      odd[i] = odd_lanes<T>(v[2 * i], v[2 * i + 1]);
    }
    split_residues<T, kHalf>(even);
    split_residues<T, kHalf>(odd);
    for (int i = 0; i < kHalf; ++i) {
      v[2 * i] = even[i];
      v[2 * i + 1] = odd[i];
    }
  }
}

// The lanes of a and b in turns: of the low halves if Half is 0, of the high ones if it is 1.
template <class T, int Half>
inline Vector<T> zip_lanes(Vector<T> a, Vector<T> b) {
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  constexpr int kN = kLanes<T>;
  for (int i = 0; i < kN; ++i)
    mask[i] = static_cast<Index>(Half * kN / 2 + i / 2 + (i % 2 ? kN : 0));
  return __builtin_shuffle(a, b, mask);
}

// The inverse of split_residues: v[0], v[1], ... become in a row what takes one lane of each of
// them in turns.
template <class T, int Stride>
DECONV_INLINE void join_residues(Vector<T>* v) {
  if constexpr (Stride > 1) {
    constexpr int kHalf = Stride / 2;
    Vector<T> even[kHalf], odd[kHalf];
    for (int i = 0; i < kHalf; ++i) {
      even[i] = v[2 * i];
      odd[i] = v[2 * i + 1];
    }
    join_residues<T, kHalf>(even);
    join_residues<T, kHalf>(odd);
    for (int i = 0; i < kHalf; ++i) {
      v[2 * i] = zip_lanes<T, 0>(even[i], odd[i]);
      v[2 * i + 1] = zip_lanes<T, 1>(even[i], odd[i]);
    }
  }
}

// to[r * pitch + i] = from[i * Stride + r] for all r < Stride and i < count, in whole vectors; zero
// where only `left` elements are there.
template <int Stride, class T, class P>
inline void deinterleave_by(T* to, int64_t pitch, P from, int64_t count, int64_t left) {
  constexpr int kN = kLanes<T>;
  int64_t i = 0;
  for (; i < count && left >= (i + kN) * Stride; i += kN) {
    Vector<T> v[Stride];
    for (int r = 0; r < Stride; ++r) v[r] = load_as<T>(from + i * Stride + r * kN);
    split_residues<T, Stride>(v);
    for (int r = 0; r < Stride; ++r) store_vector(to + r * pitch + i, v[r]);
  }
  for (; i < count; i += kN) {
    Vector<T> v[Stride];
    for (int r = 0; r < Stride; ++r) {
      const int64_t at = i * Stride + r * kN;
      v[r] = left - at >= kN ? load_as<T>(from + at)
             : left > at     ? load_first<T>(from + at, left - at)
                             : Vector<T>{};
    }
    split_residues<T, Stride>(v);
    for (int r = 0; r < Stride; ++r) store_vector(to + r * pitch + i, v[r]);
  }
}

// Interleaves blocks of `Block` lanes of a and b: the low halves' if First is 0, the high halves'
// if it is 1.
template <class T, int Block, int First>
inline Vector<T> interleave_blocks(Vector<T> a, Vector<T> b) {
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  constexpr int kN = kLanes<T>;
  for (int i = 0; i < kN; ++i) {
    const int block = i / Block, lane = i % Block;
    mask[i] = static_cast<Index>((block % 2 ? kN : 0) + (block / 2 * 2 + First) * Block + lane);
  }
  return __builtin_shuffle(a, b, mask);
}

// One step of a transposition by halves: swaps the off-diagonal blocks of size Block within each
// pair of blocks of rows.
template <class T, int Block>
inline void transpose_step(Vector<T>* rows) {
  constexpr int kN = kLanes<T>;
  for (int base = 0; base < kN; base += 2 * Block)
    for (int i = base; i < base + Block; ++i) {
      const Vector<T> a = rows[i], b = rows[i + Block];
      rows[i] = interleave_blocks<T, Block, 0>(a, b);
      rows[i + Block] = interleave_blocks<T, Block, 1>(a, b);
    }
  if constexpr (Block > 1) transpose_step<T, Block / 2>(rows);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i, j < kLanes
template <class T, class P>
inline void transpose_square(P from, int64_t from_stride, T* to, int64_t to_stride) {
  constexpr int kN = kLanes<T>;
  Vector<T> rows[kN];
  for (int i = 0; i < kN; ++i) rows[i] = load_as<T>(from + i * from_stride);
  transpose_step<T, kN / 2>(rows);
  for (int i = 0; i < kN; ++i) store_vector(to + i * to_stride, rows[i]);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns
template <class T, class P>
inline void transpose(P from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                      int64_t to_stride) {
  constexpr int64_t kN = kLanes<T>;
  for (int64_t i = 0; i < rows; i += kN)
    for (int64_t j = 0; j < columns; j += kN) {
      const P corner = from + i * from_stride + j;
      T* corner_to = to + j * to_stride + i;
      if (rows - i >= kN && columns - j >= kN) {
        transpose_square(corner, from_stride, corner_to, to_stride);
        continue;
      }
      Vector<T> square[kN];
      for (int64_t k = 0; k < kN; ++k)
        square[k] =
            k < rows - i ? load_every<T, 1>(corner + k * from_stride, columns - j) : Vector<T>{};
      transpose_step<T, kN / 2>(square);
      for (int64_t k = 0; k < min_of(kN, columns - j); ++k)
        store_first(corner_to + k * to_stride, square[k], min_of(kN, rows - i));
    }
}

// deinterleave_by for any stride; `to` has room for whole vectors.
template <class T, class P>
inline void deinterleave(T* to, int64_t pitch, P from, int64_t stride, int64_t count,
                         int64_t left) {
  switch (stride) {
    case 1:
      return deinterleave_by<1>(to, pitch, from, count, left);
    case 2:
      return deinterleave_by<2>(to, pitch, from, count, left);
    case 4:
      return deinterleave_by<4>(to, pitch, from, count, left);
    case 8:
      return deinterleave_by<8>(to, pitch, from, count, left);
  }
  // Multiples of a vector: squares of positions and residues, transposed.
  constexpr int64_t kN = kLanes<T>;
  int64_t i = 0;
  for (; stride % kN == 0 && i + kN <= count && (i + kN) * stride <= left; i += kN)
    for (int64_t r = 0; r < stride; r += kN)
      transpose_square(from + i * stride + r, stride, to + r * pitch + i, pitch);
  for (; i < count; ++i)
    for (int64_t r = 0; r < stride; ++r)
      to[r * pitch + i] = i * stride + r < left ? convert<T>(from[i * stride + r]) : T(0);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
