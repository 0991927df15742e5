// The one inner loop of every matrix product in here, a batch-reduce GEMM on a register tile:
//
//     C[m][n] (+)= sum over segments s, steps k < length_s of A_s[m][k] * B_s[k][n]        m < RM,
//     n < RN vectors
//
// A is broadcast: element (m, k) lies at a + row[m] + k * step_a, so A may be a packed panel
// (row[m] = m, step_a = RM), rows of a tensor (row[m] = m * pitch, step_a = 1) or a padded image
// that is read with a stride. B has RN full vectors a step, side by side, and its steps are step_b
// apart: a packed panel (step_b = RN vectors) or rows of a tensor. Segments let the caller leave
// out what is known to be zero (a kernel element that reads outside the image) and stitch panels
// together.
//
// Sums start at zero in every call and are added to C once. Adding short partial sums keeps the
// rounding error low: callers end one after at most kPartialSum steps, by marking a segment or by
// ending the call, which costs more.
//
// Register budget: RM * RN sums + RN vectors of B + 1 broadcast <= the ISA's registers.
#pragma once

#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

constexpr int64_t kPartialSum = 128;

template <class T>
struct Segment {
  const T* a;
  const T* b;
  int64_t length;
  bool ends_part;  // whether a partial sum ends here
};

// C: a panel of sums, or the place of the result itself.
template <class T>
struct TileTarget {
  T* c;
  int64_t pitch;    // from row to row
  int64_t rows;     // that exist, at most RM
  bool accumulate;  // add to what is there
  const T* bias;    // [RN vectors] added last, or null
};

template <class T, int RM, int RN>
void multiply_tile(const Segment<T>* segments, int64_t count, const int64_t* row, int64_t step_a,
                   int64_t step_b, const TileTarget<T>& to) {
  static_assert(RM * RN + RN + 1 <= kRegisters, "the tile must stay in registers");
  constexpr int kN = kLanes<T>;
  Vector<T> sum[RM * RN];
  T parts[RM * RN * kN];  // the sum of those that have ended
  bool any_parts = false;
  unroll<RM * RN>([&](auto i) DECONV_INLINED { sum[i] = Vector<T>{}; });

  // One base pointer and RM distances, which stay in general registers.
  int64_t offset[RM];
  unroll<RM>([&](auto m) DECONV_INLINED { offset[m] = row[m]; });
  for (int64_t s = 0; s < count; ++s) {
    const T *a = segments[s].a, *b = segments[s].b;
    for (const T* const end = b + segments[s].length * step_b; b != end; b += step_b, a += step_a) {
      Vector<T> vb[RN];
      unroll<RN>([&](auto n) DECONV_INLINED { vb[n] = load_vector(b + n * kN); });
      unroll<RM>([&](auto m) DECONV_INLINED {
        const T va = a[offset[m]];
        unroll<RN>([&](auto n) DECONV_INLINED { sum[m * RN + n] += va * vb[n]; });
      });
    }
    if (segments[s].ends_part && s + 1 < count) {
      unroll<RM * RN>([&](auto i) DECONV_INLINED {
        if (any_parts) sum[i] += load_vector(parts + i * kN);
        store_vector(parts + i * kN, sum[i]);
        sum[i] = Vector<T>{};
      });
      any_parts = true;
    }
  }
  if (any_parts)
    unroll<RM * RN>([&](auto i) DECONV_INLINED { sum[i] += load_vector(parts + i * kN); });

  // Apart from the full tile without a bias, so that its stores are not interrupted by questions.
  T* c = to.c;
  const int64_t pitch = to.pitch, rows = to.rows;
  const T* bias = to.bias;
  const bool accumulate = to.accumulate;
  const auto place = [&](int i) { return c + i / RN * pitch + i % RN * kN; };
  if (rows == RM && !bias) {
    if (accumulate)
      unroll<RM * RN>([&](auto i) DECONV_INLINED { sum[i] += load_vector(place(i)); });
    unroll<RM * RN>([&](auto i) DECONV_INLINED { store_vector(place(i), sum[i]); });
    return;
  }
  unroll<RM * RN>([&](auto i) DECONV_INLINED {
    if (i / RN >= rows) return;
    if (accumulate) sum[i] += load_vector(place(i));
    if (bias) sum[i] += load_vector(bias + i % RN * kN);
    store_vector(place(i), sum[i]);
  });
}

// Sums of few terms over many tiles, rows on the vector side (gather_short.h).
template <class T>
struct ShortProduct;
template <class T, int RN>
void multiply_short_by(int64_t steps, const ShortProduct<T>& product);

// The tiles that exist, as data: planning chooses by these numbers, drivers call by index.
template <class T>
struct Tile {
  int rows, vectors;  // RM, RN
  void (*multiply)(const Segment<T>*, int64_t, const int64_t*, int64_t, int64_t,
                   const TileTarget<T>&);
  void (*multiply_short)(int64_t steps, const ShortProduct<T>&);  // or null
};

template <class T, int RM, int RN>
constexpr Tile<T> make_tile() {
  return {RM, RN, multiply_tile<T, RM, RN>, multiply_short_by<T, RN>};
}

// 32 registers: 8x3 and 6x4 use 24 sums; 16 registers: 4x3 and 6x2 use 12. Loads per step
// are RM + RN at two a cycle, against RM * RN / 2 cycles of multiply-add; the narrow tiles serve
// few rows or few lanes.
template <class T>
struct Tiles {
#if DECONV_VECTOR_REGISTERS >= 32
  static constexpr Tile<T> list[] = {make_tile<T, 8, 3>(), make_tile<T, 6, 4>(),
                                     make_tile<T, 9, 3>(), make_tile<T, 4, 4>(),
                                     make_tile<T, 8, 2>(), make_tile<T, 8, 1>()};
#else
  static constexpr Tile<T> list[] = {make_tile<T, 4, 3>(), make_tile<T, 6, 2>(),
                                     make_tile<T, 3, 3>(), make_tile<T, 4, 2>(),
                                     make_tile<T, 4, 1>()};
#endif
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
