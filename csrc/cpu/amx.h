// Tile registers of AMX: eight of them, 16 rows of 64 bytes. One multiplication takes 16 rows, 16
// lanes and 16 pairs of bfloat16:
//
//     C[m][n] += sum over pairs k of A[m][k].even * B[k][n].even + A[m][k].odd * B[k][n].odd
//
// Products are exact, sums are float32. Denormal operands count as zero, whatever the caller's
// setting: the instruction knows no other way. Pairs travel as floats (pairs.h).
#pragma once

#include "pair_tiles.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Pairs, rows and lanes of a tile register.
constexpr int64_t kAmxSide = 16;

#ifdef DECONV_EMULATED
template <int Register, class E>
inline void load_amx(const E* p, int64_t pitch) {
  emulated::load_tile(Register, p, pitch * sizeof(E));
}
template <int Register>
inline void store_amx(float* p, int64_t pitch) {
  emulated::store_tile(Register, p, pitch * sizeof(float));
}
template <int Register>
inline void clear_amx() {
  emulated::clear_tile(Register);
}
template <int C, int A, int B>
inline void multiply_amx() {
  emulated::multiply_tiles(C, A, B);
}
using AmxSession = emulated::TileSession;
#else
// Registers by number, in the text of an instruction. No memory is named: a tile is too large.
// Rows are `pitch` elements of E apart, and need not be aligned.
template <int Register, class E>
DECONV_INLINE void load_amx(const E* p, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(pitch * sizeof(E)), "i"(Register)
               : "memory");
}
template <int Register>
DECONV_INLINE void store_amx(float* p, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(pitch * sizeof(float)), "i"(Register)
               : "memory");
}
template <int Register>
DECONV_INLINE void clear_amx() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Register));
}
template <int C, int A, int B>
DECONV_INLINE void multiply_amx() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// Tile registers belong to a thread, whose other code may shape them otherwise. So each product
// begins by shaping them, all as 16 rows of 64 bytes, and leaves them free.
struct AmxSession {
  AmxSession() {
    struct {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shape{};
    static_assert(sizeof(shape) == 64, "as the instruction reads it");
    shape.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shape.row_bytes[i] = 64;
      shape.rows[i] = kAmxSide;
    }
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~AmxSession() { asm volatile("tilerelease"); }
  AmxSession(const AmxSession&) = delete;
  AmxSession& operator=(const AmxSession&) = delete;
};
#endif

// 16 RM rows times 16 RN lanes. Registers: sums, the shorter side, and in turns what is left for
// the longer one.
template <int RM, int RN>
struct AmxProduct {
  static constexpr bool kHoldA = RM <= RN;
  static constexpr int kHeld = RM * RN, kTurns = kHeld + (kHoldA ? RM : RN), kLeft = 8 - kTurns;
  static_assert(kLeft >= 1, "the tile must stay in registers");

  // The sums begin with what is in c, or with zero.
  DECONV_INLINE static void begin(const float* c, int64_t pitch, bool accumulate) {
    unroll<RM * RN>([&](auto i) {
      if (accumulate) {
        load_amx<i>(c + i / RN * kAmxSide * pitch + i % RN * kAmxSide, pitch);
      } else {
        clear_amx<i>();
      }
    });
  }

  // Pairs in whole tiles. Rows of A, `pitch_a` apart, hold pairs side by side; those of the next
  // tile of A are `step_a` away. B has its lanes side by side.
  template <class E>
  DECONV_INLINE static void add(const E* a, int64_t pitch_a, int64_t step_a, const float* b,
                                int64_t pitch_b, int64_t pairs) {
    for (; pairs > 0; pairs -= kAmxSide) {
      if constexpr (kHoldA) {
        unroll<RM>([&](auto m) { load_amx<kHeld + m>(a + m * kAmxSide * pitch_a, pitch_a); });
        unroll<RN>([&](auto n) {
          load_amx<kTurns + n % kLeft>(b + n * kAmxSide, pitch_b);
          unroll<RM>([&](auto m) { multiply_amx<m * RN + n, kHeld + m, kTurns + n % kLeft>(); });
        });
      } else {
        unroll<RN>([&](auto n) { load_amx<kHeld + n>(b + n * kAmxSide, pitch_b); });
        unroll<RM>([&](auto m) {
          load_amx<kTurns + m % kLeft>(a + m * kAmxSide * pitch_a, pitch_a);
          unroll<RN>([&](auto n) { multiply_amx<m * RN + n, kTurns + m % kLeft, kHeld + n>(); });
        });
      }
      a += step_a;
      b += kAmxSide * pitch_b;
    }
  }

  DECONV_INLINE static void end(float* c, int64_t pitch) {
    unroll<RM * RN>(
        [&](auto i) { store_amx<i>(c + i / RN * kAmxSide * pitch + i % RN * kAmxSide, pitch); });
  }
};

// Segments are whole tiles of pairs.
template <int RM, int RN>
void multiply_amx_tiles(const SegmentList& segments, const TileTask<float>* task, int64_t tasks) {
  using Product = AmxProduct<RM, RN>;
  for (const TileTask<float>* const last = task + tasks; task != last; ++task) {
    const TileTarget<float>& to = task->to;
    Product::begin(to.c, to.pitch, to.accumulate);
    for (int64_t s = 0; s < segments.count; ++s) {
      const Segment& segment = segments.list[s];
      Product::add(task->a + segment.a + task->row[0], task->row[1] - task->row[0],
                   kAmxSide * segments.step_a, task->b + segment.b, segments.step_b,
                   segment.length);
    }
    Product::end(to.c, to.pitch);
  }
}

template <int RM, int RN>
void multiply_amx_strips(const PairStrip* strips, int64_t count, const int64_t* row, float* c,
                         int64_t pitch, bool accumulate) {
  using Product = AmxProduct<RM, RN>;
  Product::begin(c, pitch, accumulate);
  for (int64_t s = 0; s < count; ++s)
    Product::add(strips[s].a + row[0], row[1] - row[0], 2 * kAmxSide, strips[s].b, RN * kAmxSide,
                 strips[s].pairs);
  Product::end(c, pitch);
}

template <int RM, int RN>
constexpr PairTile make_amx_tile() {
  const auto multiply = multiply_amx_tiles<RM, RN>;
  return {{RM * static_cast<int>(kAmxSide), RN, multiply, multiply, nullptr, nullptr, nullptr,
           nullptr, nullptr},
          multiply_amx_strips<RM, RN>};
}

// How pairs are multiplied, as gather_pairs.h and weight_pairs.h ask for it.
struct Amx {
  using Session = AmxSession;
  static constexpr int64_t kUnit = kAmxSide;  // pairs at a time
  static constexpr PairTile kTiles[] = {make_amx_tile<2, 2>(), make_amx_tile<1, 4>(),
                                        make_amx_tile<4, 1>(), make_amx_tile<1, 1>()};

  // A multiplication takes 16 cycles for 16 pairs, a load 8.
  static double cycles_per_step(int rows, int vectors) {
    const int rm = rows / static_cast<int>(kAmxSide);
    return max_of<double>(rm * vectors, 0.5 * (rm + vectors)) + 0.25 * vectors;
  }
  // Nothing else reads a part of a tile of pairs.
  static constexpr bool kTakesTaps = false, kRounds = false;
  static bool takes(int64_t channels) { return channels % (2 * kAmxSide) == 0; }
  // Rows of a tile of grad_weight are equally far apart.
  static constexpr bool kAnyRows = false;
  // Where a quarter of the tiles is filled, or more: multiply-adds take eight times as long.
  static bool takes_weight(int64_t rows, int64_t lanes) {
    return 4 * rows * lanes >= round_up(rows, kAmxSide) * round_up(lanes, kAmxSide);
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
