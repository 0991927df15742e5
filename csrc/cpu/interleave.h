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
                            T bias, bool streams) {
  const T* source[Width];
  for (int p = 0; p < Width; ++p) source[p] = from[p] + at;
  int64_t i = 0;
  if constexpr ((Width & (Width - 1)) == 0) {
    constexpr int64_t kN = kLanes<T>;
    const auto whole_vectors = [&](const auto& store) DECONV_INLINED {
      for (; i + kN <= count; i += kN) {
        Vector<T> v[Width];
        for (int p = 0; p < Width; ++p) v[p] = load_vector(source[p] + i) + bias;
        join_residues<T, Width>(v);
        for (int p = 0; p < Width; ++p) store(to + i * Width + p * kN, v[p]);
      }
    };
    if (streams && streamable<T>(to)) {
      whole_vectors([](S* p, Vector<T> v) DECONV_INLINED { stream_as(p, v); });
    } else {
      whole_vectors([](S* p, Vector<T> v) DECONV_INLINED { store_as(p, v); });
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

// A row of the target, of which phases are written from element `start` on.
template <class S>
struct TargetRow {
  S* data;
  int64_t size;
  int64_t start, step;
  bool streams;  // past the caches
};

// to[start + i * step + p] = from[p][at + i] + bias, where that index is in [0, size)
template <class S, class T>
inline void interleave(const TargetRow<S>& to, const T* const* from, int64_t width, int64_t at,
                       int64_t count, T bias) {
  const int64_t start = to.start, step = to.step, size = to.size;
  const int64_t head = start < 0 ? min_of(count, (-start + step - 1) / step) : 0;
  const int64_t room = size - start - width;  // without a division where all of it is inside
  const int64_t full = room >= (count - 1) * step ? count : room >= 0 ? room / step + 1 : 0;
  const int64_t tail = max_of(head, min_of(count, full));
  const auto edge = [&](int64_t i) {
    for (int64_t p = 0; p < width; ++p) {
      const int64_t index = start + i * step + p;
      if (index >= 0 && index < size) to.data[index] = convert<S>(from[p][at + i] + bias);
    }
  };
  for (int64_t i = 0; i < head; ++i) edge(i);
  S* inner = to.data + start + head * step;
  const auto all_phases = [&](auto phases) DECONV_INLINED {
    constexpr int kWidth = decltype(phases)::value;
    if (width != kWidth || step != kWidth) return false;
    interleave_full<kWidth>(inner, from, at + head, tail - head, bias, to.streams);
    return true;
  };
  if (!all_phases(Number<1>{}) && !all_phases(Number<2>{}) && !all_phases(Number<3>{}) &&
      !all_phases(Number<4>{}) && !all_phases(Number<8>{})) {
    for (int64_t i = head; i < tail; ++i)
      for (int64_t p = 0; p < width; ++p)
        to.data[start + i * step + p] = convert<S>(from[p][at + i] + bias);
  }
  for (int64_t i = tail; i < count; ++i) edge(i);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
