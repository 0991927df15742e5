// Puts the phases of a row back into place. Each phase of an output row was computed by itself,
// contiguous; writing them one by one would touch every cache line `stride` times.
#pragma once

#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// to[i * Width + p] = from[p][at + i] + bias
template <int Width, class S, class T>
inline void interleave_full(S* __restrict to, const T* const* from, int64_t at, int64_t count,
                            T bias) {
  const T* source[Width];
  for (int p = 0; p < Width; ++p) source[p] = from[p] + at;
  int64_t i = 0;
  if constexpr ((Width & (Width - 1)) == 0) {
    constexpr int64_t kN = kLanes<T>;
    for (; i + kN <= count; i += kN) {
      Vector<T> v[Width];
      for (int p = 0; p < Width; ++p) v[p] = load_vector(source[p] + i) + bias;
      join_residues<T, Width>(v);
      for (int p = 0; p < Width; ++p) store_as(to + i * Width + p * kN, v[p]);
    }
    // Rows are often shorter than a vector, or end with less than one.
    if (const int64_t left = count - i; left > 0) {
      Vector<T> v[Width];
      for (int p = 0; p < Width; ++p) v[p] = load_first<T>(source[p] + i, left) + bias;
      join_residues<T, Width>(v);
      for (int p = 0; p < Width; ++p)
        if (left * Width > p * kN)
          store_first_as(to + i * Width + p * kN, v[p], min_of(kN, left * Width - p * kN));
    }
    return;
  }
  for (; i < count; ++i)
    for (int p = 0; p < Width; ++p) to[i * Width + p] = convert<S>(source[p][i] + bias);
}

// to[start + i * step + p] = from[p][at + i] + bias, where that index is in [0, size)
template <class S, class T>
inline void interleave(S* to, int64_t start, int64_t step, int64_t size, const T* const* from,
                       int64_t width, int64_t at, int64_t count, T bias) {
  const int64_t head = start < 0 ? min_of(count, (-start + step - 1) / step) : 0;
  const int64_t room = size - start - width;  // without a division where all of it is inside
  const int64_t full = room >= (count - 1) * step ? count : room >= 0 ? room / step + 1 : 0;
  const int64_t tail = max_of(head, min_of(count, full));
  const auto edge = [&](int64_t i) {
    for (int64_t p = 0; p < width; ++p) {
      const int64_t index = start + i * step + p;
      if (index >= 0 && index < size) to[index] = convert<S>(from[p][at + i] + bias);
    }
  };
  for (int64_t i = 0; i < head; ++i) edge(i);
  S* inner = to + start + head * step;
  if (width == 1 && step == 1) {
    interleave_full<1>(inner, from, at + head, tail - head, bias);
  } else if (width == 2 && step == 2) {
    interleave_full<2>(inner, from, at + head, tail - head, bias);
  } else if (width == 3 && step == 3) {
    interleave_full<3>(inner, from, at + head, tail - head, bias);
  } else if (width == 4 && step == 4) {
    interleave_full<4>(inner, from, at + head, tail - head, bias);
  } else if (width == 8 && step == 8) {
    interleave_full<8>(inner, from, at + head, tail - head, bias);
  } else {
    for (int64_t i = head; i < tail; ++i)
      for (int64_t p = 0; p < width; ++p)
        to[start + i * step + p] = convert<S>(from[p][at + i] + bias);
  }
  for (int64_t i = tail; i < count; ++i) edge(i);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
