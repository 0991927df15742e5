// The 16-bit float formats as storage: plain structs with exact widening and round-to-nearest-even
// narrowing, branch-free so that a loop over them vectorises. Arithmetic happens in float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry.h"

namespace deconv {

template <class To, class From>
DECONV_HOST_DEVICE inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

DECONV_HOST_DEVICE inline float to_float(BFloat16 v) {
  return bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

DECONV_HOST_DEVICE inline BFloat16 to_bfloat16(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {
      static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded)};
}

// Normal numbers: rebias the exponent. Subnormals: let the float adder normalise 2^-24 * mantissa.
DECONV_HOST_DEVICE inline float to_float(Float16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t magnitude = v.bits & 0x7fffu;
  const uint32_t normal =
      (magnitude << 13) + ((127u - 15u) << 23) + (magnitude >= 0x7c00u ? (128u - 16u) << 23 : 0u);
  const uint32_t kHalfMinNormal = 113u << 23;  // 2^-14 as a float
  const uint32_t subnormal = bit_cast<uint32_t>(
      bit_cast<float>(kHalfMinNormal + (magnitude << 13)) - bit_cast<float>(kHalfMinNormal));
  return bit_cast<float>(sign | (magnitude < 0x0400u ? subnormal : normal));
}

DECONV_HOST_DEVICE inline Float16 to_float16(float v) {
  const uint32_t bits = bit_cast<uint32_t>(v);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Results below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low mantissa bits.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - (126u << 23);
  const uint32_t normal =
      (magnitude - ((127u - 15u) << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? overflow : finite))};
}

// Storage type -> the type that sums are kept in, and back.
template <class Storage>
struct Arithmetic {
  using type = Storage;
};
template <>
struct Arithmetic<Float16> {
  using type = float;
};
template <>
struct Arithmetic<BFloat16> {
  using type = float;
};

template <class To, class From>
DECONV_HOST_DEVICE inline To convert(From v) {
  return static_cast<To>(v);
}
template <>
DECONV_HOST_DEVICE inline float convert<float, Float16>(Float16 v) {
  return to_float(v);
}
template <>
DECONV_HOST_DEVICE inline float convert<float, BFloat16>(BFloat16 v) {
  return to_float(v);
}
template <>
DECONV_HOST_DEVICE inline double convert<double, Float16>(Float16 v) {
  return to_float(v);
}
template <>
DECONV_HOST_DEVICE inline double convert<double, BFloat16>(BFloat16 v) {
  return to_float(v);
}
template <>
DECONV_HOST_DEVICE inline Float16 convert<Float16, float>(float v) {
  return to_float16(v);
}
template <>
DECONV_HOST_DEVICE inline BFloat16 convert<BFloat16, float>(float v) {
  return to_bfloat16(v);
}
// The sum is rounded twice on this path; float32 in between keeps 13 (16) guard bits.
template <>
DECONV_HOST_DEVICE inline Float16 convert<Float16, double>(double v) {
  return to_float16(static_cast<float>(v));
}
template <>
DECONV_HOST_DEVICE inline BFloat16 convert<BFloat16, double>(double v) {
  return to_bfloat16(static_cast<float>(v));
}

}  // namespace deconv
