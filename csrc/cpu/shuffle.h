// Moving elements by vectors: strided copies, rows split into the residues of a stride and joined
// again, transposed squares.
#pragma once

#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// P is a pointer to elements, or what reads as one (pairs.h).

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
  if constexpr (sizeof(T) >= 4) {
    // The loop becomes a call of memset.
    if (count < kLanes<T>) {
      if (count > 0) store_first(to, Vector<T>{}, count);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) to[i] = T{};
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

// The upper half of the lanes, in the lower half.
template <class T>
inline Vector<T> upper_half(Vector<T> v) {
  typedef typename IntegerOf<sizeof(T)>::type Index;
  Vector<Index> mask;
  constexpr int kN = kLanes<T>;
  for (int i = 0; i < kN; ++i) mask[i] = static_cast<Index>((i + kN / 2) % kN);
  return __builtin_shuffle(v, mask);
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
      if (rows - i <= kN / 2 && columns - j > kN) {
        // Half a square each of these columns and of the next ones.
        const int64_t some = rows - i, next = min_of(kN, columns - j - kN);
        for (int64_t k = 0; k < kN / 2; ++k) {
          const P row = corner + k * from_stride;
          square[k] = k < some ? load_as<T>(row) : Vector<T>{};
          square[kN / 2 + k] = k < some ? load_every<T, 1>(row + kN, next) : Vector<T>{};
        }
        transpose_step<T, kN / 2>(square);
        for (int64_t k = 0; k < kN; ++k) store_first(corner_to + k * to_stride, square[k], some);
        for (int64_t k = 0; k < next; ++k)
          store_first(corner_to + (kN + k) * to_stride, upper_half<T>(square[k]), some);
        j += kN;
        continue;
      }
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
