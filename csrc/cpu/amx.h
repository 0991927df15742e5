// Tile registers of AMX: eight of them, 16 rows of 64 bytes. One multiplication takes 16 rows, 16
// lanes and 16 pairs of bfloat16:
//
//     C[m][n] += sum over pairs k of A[m][k].even * B[k][n].even + A[m][k].odd * B[k][n].odd
//
// Products are exact, sums are float32. Denormal operands count as zero, whatever the caller's
// setting: the instruction knows no other way. Pairs travel as floats (pairs.h).
#pragma once

#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Pairs, rows and lanes of a tile register.
constexpr int64_t kAmxSide = 16;

#ifdef DECONV_EMULATED
template <int Register>
inline void load_amx(const float* p, int64_t pitch) {
  emulated::load_tile(Register, p, pitch);
}
template <int Register>
inline void store_amx(float* p, int64_t pitch) {
  emulated::store_tile(Register, p, pitch);
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
template <int Register>
DECONV_INLINE void load_amx(const float* p, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(pitch * 4), "i"(Register) : "memory");
}
template <int Register>
DECONV_INLINE void store_amx(float* p, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(pitch * 4), "i"(Register) : "memory");
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

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
