// Channels as lanes ("depthwise"): some vectors of them, in the order that takes the fewest
// instructions.
//
// A 32-bit word holds two bfloat16 numbers. Each is widened where it lies, by a shift or a mask, so
// that of two vectors of channels one has the even and the other the odd ones: two instructions
// instead of two loads that spread and two shifts. Weights, biases and sums are kept in this order
// of the lanes. Other types have the order of memory.
#pragma once

#include <type_traits>

#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Where channel c of `channels` lies in the order of the lanes.
template <class S>
inline int64_t lane_of_channel(int64_t c, int64_t channels) {
  constexpr int64_t kN = kLanes<typename Arithmetic<S>::type>, kPair = 2 * kN;
  if (!std::is_same_v<S, BFloat16> || c >= channels / kPair * kPair) return c;
  return c / kPair * kPair + c % 2 * kN + c % kPair / 2;
}

// Calls visit(vectors, c) for pieces of the channels: so many vectors from c on, the last perhaps a
// part of one.
template <class T, int Most, class Visit>
DECONV_INLINE void for_channels(int64_t channels, const Visit& visit) {
  constexpr int kN = kLanes<T>;
  int64_t c = 0;
  if constexpr (Most > 2)
    for (; c + Most * kN <= channels; c += Most * kN) visit(std::integral_constant<int, Most>{}, c);
  for (; c + 2 * kN <= channels; c += 2 * kN) visit(std::integral_constant<int, 2>{}, c);
  for (; c < channels; c += kN) visit(std::integral_constant<int, 1>{}, c);
}

// Loads Vectors of channels: an even number, or one, of which there may be fewer than fill it.
template <int Vectors, class T, class S>
DECONV_INLINE void load_channels(const S* from, int64_t channels, Vector<T> (&to)[Vectors]) {
  constexpr int kN = kLanes<T>;
  static_assert(Vectors == 1 || Vectors % 2 == 0);
  if constexpr (Vectors == 1) {
    to[0] = channels >= kN ? load_as<T>(from) : load_first<T>(from, channels);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef Vector<uint32_t> Words;
    for (int v = 0; v < Vectors; v += 2) {
      Words words;
      __builtin_memcpy(&words, from + v * kN, sizeof(words));
      to[v] = reinterpret_cast<Vector<T>>(words << 16);
      to[v + 1] = reinterpret_cast<Vector<T>>(words & 0xffff0000);
    }
  } else {
    for (int v = 0; v < Vectors; ++v) to[v] = load_as<T>(from + v * kN);
  }
}

// Stores them, past the caches if `streams` and the place allows it.
template <int Vectors, class T, class S>
DECONV_INLINE void store_channels(S* to, int64_t channels, const Vector<T> (&from)[Vectors],
                                  bool streams) {
  constexpr int kN = kLanes<T>;
  const auto store = [&](auto* here, auto vector) DECONV_INLINED {
    if (streams && streamable<T>(here)) {
      stream_as(here, vector);
    } else {
      store_as(here, vector);
    }
  };
  if constexpr (Vectors == 1) {
    if (channels < kN) return store_first_as(to, from[0], channels);
    store(to, from[0]);
  } else if constexpr (std::is_same_v<S, BFloat16>) {
    typedef Vector<uint32_t> Words;
    for (int v = 0; v < Vectors; v += 2) {
      const Words words =
          round_bfloat16(from[v]) >> 16 | (round_bfloat16(from[v + 1]) & 0xffff0000);
      store(reinterpret_cast<T*>(to + v * kN), reinterpret_cast<Vector<T>>(words));
    }
  } else {
    for (int v = 0; v < Vectors; ++v) store(to + v * kN, from[v]);
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
