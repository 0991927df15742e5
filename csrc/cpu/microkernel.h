// The one inner loop of every matrix product in here, a batch-reduce GEMM on register tiles:
//
//     C[m][n] (+)= sum over segments s, steps k < length_s of A_s[m][k] * B_s[k][n]        m < RM,
//     n < RN vectors
//
// A is broadcast: element (m, k) of a segment lies row[m] + k * step_a elements behind its
// beginning. B has RN full vectors a step, side by side, and its steps are step_b apart. Which of
// these distances the compiler knows is stated by Steps. Segments let the caller leave out what is
// known to be zero (a kernel element that reads outside the image) and stitch panels together. One
// call takes many tiles with the same segments, since a call's beginning and end cost as much as
// ten steps.
//
// Sums start at zero and are added to C once. Adding short partial sums keeps the rounding error
// low: callers end one after at most kPartialSum steps, by marking a segment or by ending the call.
//
// Register budget: RM * RN sums + RN vectors of B + 1 broadcast <= the ISA's registers.
#pragma once

#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

constexpr int64_t kPartialSum = 128;

enum class Steps {
  kContiguousA,  // step_a = 1: channels of pixels; B is a panel, step_b = RN vectors
  kPanelA,       // A is a panel, row[m] = m and step_a = RM
  kPanelB,       // B is a panel, step_b = RN vectors
};

struct Segment {
  int64_t a, b;  // elements from a tile's a and b to the first step
  int64_t length;
  bool ends_part;  // whether a partial sum ends here
};

// Where the lanes of a vector go: the first `head` to one place, so many of the `rest` to another.
struct VectorPlace {
  int64_t first, head, second, rest;
};

// A row of C that rows of the tile take turns in: elements from c on to where its VectorPlaces
// count from, and what is added last.
template <class T>
struct LinePlace {
  int64_t at;
  T bias;
};

// C: a panel of sums, or the place of the result itself, whose elements may be others.
template <class T>
struct TileTarget {
  T* c;
  union {
    int64_t pitch;               // from row to row
    const VectorPlace* vectors;  // [RN], where rows take turns
  };
  int64_t rows;     // of C that exist, at most RM
  bool accumulate;  // add to what is there
  union {
    const T* bias;              // [RN vectors] added last, or null
    const LinePlace<T>* lines;  // [rows], where rows take turns
  };
};

template <class T>
struct TileTask {
  const T *a, *b;
  const int64_t* row;  // elements from the beginning of A to its rows
  TileTarget<T> to;
};

struct SegmentList {
  Segment* list;
  int64_t count;
  int64_t step_a, step_b;  // where Steps leaves them open
};

// What a step does to a sum. The other one multiplies pairs (dot.h).
struct MultiplyAdd {
  template <class T>
  DECONV_INLINE static void add(Vector<T>& sum, Vector<T> a, Vector<T> b) {
    multiply_add<T>(sum, a, b);
  }
  template <class T>
  DECONV_INLINE static void add(Vector<T>& sum, const T* a, Vector<T> b) {
    multiply_add<T>(sum, a, b);
  }
  template <class T>
  DECONV_INLINE static void store(T* p, Vector<T> sum) {
    store_vector(p, sum);
  }
};

// What a thread must hold while it multiplies in vector registers: nothing.
struct NoSession {};

// sum += A * B of one segment; `distance` in bytes, or else an index would be computed each step
template <class T, int RM, int RN, Steps steps, class Multiply>
DECONV_INLINE void multiply_segment(const T* a, const T* b, int64_t length, int64_t* distance,
                                    int64_t step_a, int64_t step_b, Vector<T>* sum) {
  constexpr int kN = kLanes<T>, kWidth = RN * kN, kUnrolled = 4;
  // Steps whose distances are known are reached by a displacement; else the pointer moves on.
  constexpr bool kMoveA = steps == Steps::kPanelB, kMoveB = steps == Steps::kPanelA;
  constexpr int kStepA = kMoveA                    ? 0
                         : steps == Steps::kPanelA ? RM
                                                   : 1,
                kStepB = kMoveB ? 0 : kWidth;
  const auto step = [&](auto k) DECONV_INLINED {
    Vector<T> vb[RN];
    unroll<RN>([&](auto n) DECONV_INLINED { vb[n] = load_vector(b + k * kStepB + n * kN); });
    unroll<RM>([&](auto m) DECONV_INLINED {
      const T* va = a + k * kStepA;
      if constexpr (steps == Steps::kPanelA) {
        va += m;
      } else {
        // Not a constant of the loop, or the sums with k would be kept in memory.
        keep_in_register(distance[m]);
        va = reinterpret_cast<const T*>(reinterpret_cast<const char*>(va) + distance[m]);
      }
      if constexpr (RN == 1) {
        Multiply::template add<T>(sum[m], va, vb[0]);
      } else {
        const Vector<T> factor = broadcast(*va);
        unroll<RN>([&](auto n) DECONV_INLINED {
          Multiply::template add<T>(sum[m * RN + n], factor, vb[n]);
        });
      }
    });
    if constexpr (kMoveA) a += step_a;
    if constexpr (kMoveB) b += step_b;
  };
  int64_t left = length;
  for (; left >= kUnrolled; left -= kUnrolled) {
    unroll<kUnrolled>(step);
    a += kUnrolled * kStepA;
    b += kUnrolled * kStepB;
  }
  for (; left > 0; --left) {
    step(Number<0>{});
    a += kStepA;
    b += kStepB;
  }
}

// Phases rows of sums at a time to one row of C. If InPieces, vectors may be divided.
template <class T, int RM, int RN, int Phases, bool InPieces>
DECONV_INLINE void store_in_turns(const Vector<T>* sum, const TileTarget<T>& to) {
  constexpr int kN = kLanes<T>;
  unroll<RM / Phases>([&](auto row) DECONV_INLINED {
    if (row >= to.rows) return;
    T* c = to.c + to.lines[row].at;
    const T bias = to.lines[row].bias;
    unroll<RN>([&](auto n) DECONV_INLINED {
      const VectorPlace& place = to.vectors[n];
      Vector<T> v[Phases];
      unroll<Phases>([&](auto p) DECONV_INLINED { v[p] = sum[(row * Phases + p) * RN + n]; });
      join_residues<T, Phases>(v);
      if (!InPieces || place.head == kN) {
        unroll<Phases>([&](auto p) DECONV_INLINED {
          T* at = c + place.first + p * kN;
          if (to.accumulate) v[p] += load_vector(at);
          store_vector(at, v[p] + bias);
        });
        return;
      }
      T lanes[Phases * kN];
      for (int p = 0; p < Phases; ++p) store_vector(lanes + p * kN, v[p]);
      const auto store = [&](T* at, const T* from, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          at[i] = (to.accumulate ? from[i] + at[i] : from[i]) + bias;
      };
      store(c + place.first, lanes, place.head * Phases);
      store(c + place.second, lanes + place.head * Phases, place.rest * Phases);
    });
  });
}

// A function of its own, which finds the sums in memory: or else they would be there all the time.
template <class T, int RM, int RN, int Phases>
__attribute__((noinline)) void store_pieces(const Vector<T>* sum, const TileTarget<T>& to) {
  store_in_turns<T, RM, RN, Phases, true>(sum, to);
}

// If Phases > 1, so many rows of the tile, a divisor of RM, take turns in a row of C. S: elements
// of C; if they are not those of the sums, there is nothing to accumulate.
template <class T, int RM, int RN, Steps steps, int Phases = 1, class Multiply = MultiplyAdd,
          class S = T>
void multiply_tiles(const SegmentList& segments, const TileTask<T>* task, int64_t tasks) {
  static_assert(RM * RN + RN + 1 <= kRegisters, "the tile must stay in registers");
  constexpr int kN = kLanes<T>;
  Vector<T> sum[RM * RN];
  T parts[RM * RN * kN];  // the sum of those that have ended
  const Segment* const end = segments.list + segments.count;
  for (const TileTask<T>* const last = task + tasks; task != last; ++task) {
    unroll<RM * RN>([&](auto i) DECONV_INLINED { sum[i] = Vector<T>{}; });
    int64_t distance[RM] = {};
    if constexpr (steps != Steps::kPanelA)
      unroll<RM>([&](auto m) DECONV_INLINED { distance[m] = task->row[m] * sizeof(T); });
    bool any_parts = false;
    for (const Segment* s = segments.list; s != end; ++s) {
      multiply_segment<T, RM, RN, steps, Multiply>(task->a + s->a, task->b + s->b, s->length,
                                                   distance, segments.step_a, segments.step_b, sum);
      if (s->ends_part && s + 1 != end) {
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

    const TileTarget<T>& to = task->to;
    if constexpr (Phases > 1) {
      bool whole = true;
      for (int n = 0; n < RN; ++n) whole &= to.vectors[n].head == kN;
      if (whole) {
        store_in_turns<T, RM, RN, Phases, false>(sum, to);
      } else {
        Vector<T> copy[RM * RN];
        unroll<RM * RN>([&](auto i) DECONV_INLINED { copy[i] = sum[i]; });
        store_pieces<T, RM, RN, Phases>(copy, to);
      }
      continue;
    }
    S* c = reinterpret_cast<S*>(to.c);
    const T* bias = to.bias;
    // The full tile apart, so that its stores are not interrupted by questions.
    const auto store = [&](bool accumulate, int64_t rows) DECONV_INLINED {
      unroll<RM>([&](auto m) DECONV_INLINED {
        if (m >= rows) return;
        unroll<RN>([&](auto n) DECONV_INLINED {
          Vector<T> v = sum[m * RN + n];
          if constexpr (std::is_same_v<S, T>)
            if (accumulate) v += load_vector(c + n * kN);
          if (bias) v += load_vector(bias + n * kN);
          Multiply::store(c + n * kN, v);
        });
        c += to.pitch;
      });
    };
    if (to.rows < RM) {
      store(to.accumulate, to.rows);
    } else if (to.accumulate || bias) {
      store(to.accumulate, RM);
    } else {
      bias = nullptr;
      store(false, RM);
    }
  }
}

// Sums of few terms over many tiles, rows on the vector side (gather_short.h).
template <class T>
struct ShortProduct;
template <class T, int RN, class Multiply = MultiplyAdd, class S = T>
void multiply_short_by(int64_t steps, const ShortProduct<T>& product);

template <class T>
using MultiplyTiles = void (*)(const SegmentList&, const TileTask<T>*, int64_t tasks);

// The tiles that exist, as data: planning chooses by these numbers, drivers call by index.
template <class T>
struct Tile {
  int rows, vectors;  // RM, RN
  MultiplyTiles<T> contiguous_a, panel_a, panel_b;
  MultiplyTiles<T> panel_a_by_2, panel_a_by_4;  // where so many rows take turns, or null
  // To where the result lies, be its elements those of the sums or not, or null.
  MultiplyTiles<T> contiguous_a_to_target;
  void (*multiply_short)(int64_t steps, const ShortProduct<T>&);
};

template <class T, int RM, int RN, int Phases>
constexpr MultiplyTiles<T> tiles_in_turns() {
  if constexpr (RM % Phases == 0) return multiply_tiles<T, RM, RN, Steps::kPanelA, Phases>;
  return nullptr;
}

template <class T, int RM, int RN>
constexpr Tile<T> make_tile() {
  return {RM,
          RN,
          multiply_tiles<T, RM, RN, Steps::kContiguousA>,
          multiply_tiles<T, RM, RN, Steps::kPanelA>,
          multiply_tiles<T, RM, RN, Steps::kPanelB>,
          tiles_in_turns<T, RM, RN, 2>(),
          tiles_in_turns<T, RM, RN, 4>(),
          multiply_tiles<T, RM, RN, Steps::kContiguousA>,
          multiply_short_by<T, RN>};
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
                                     make_tile<T, 8, 1>(), make_tile<T, 4, 1>()};
#endif
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
