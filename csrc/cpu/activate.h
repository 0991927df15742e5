// activation.h for vectors: what `forward` does to a block of sums while it lies in the cache.
//
// An exponential is exp(a) = 2^n * (1 + p(r)), n = round(a / ln 2), r = a - n ln 2, with a
// polynomial p(r) = exp(r) - 1 that leaves out nothing next to 1, so that tanh keeps its accuracy
// at zero:
//
//     sigmoid(v) = 1 / (1 + exp(-v))
//     tanh(v)    = sign(v) * E / (E + 2)       E = exp(2 |v|) - 1
//     gelu(v)    = max(v, 0) - u * Q(u)        u = |v|,  Q(u) = erfc(u / sqrt(2)) / 2
//                                              Q(u) = exp(-u^2 / 2) * A(u) / B(u)
//
// Where exp(a) leaves the range of T, both sides of a quotient are scaled by a power of two. The
// polynomial interpolates p at Chebyshev nodes, A / B the tail at those of (u - 3) / (u + 3); both
// with errors below half a unit of T. All coefficients of A and B are positive: nothing cancels.
// Each result is within a few units of the definition, as far as it is a normal number.
#pragma once

#include <limits>

#include "../activation.h"
#include "simd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class T>
struct ActivationConstants;

template <>
struct ActivationConstants<float> {
  static constexpr int kMantissa = 23, kBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // x + kRound - kRound is x as a whole number
  // Where exp(-v) is cut off: sigmoid is zero beyond the one, 1 beyond the other, tanh 1 beyond the
  // third and the tail of gelu zero beyond the last. Scaled by 2^kScale the first is in range.
  static constexpr float kZeroBelow = -105, kOneAbove = 20, kFarTanh = 10, kFarTail = 15;
  static constexpr int kScale = 30, kTailScale = 64;  // of exp(-v), of exp(-u^2 / 2)
  static constexpr int32_t kHead = ~0xfff;            // half of the digits of a number
  // ln 2, the first part so short that products with n are exact
  static constexpr float kLog2E = 1.44269504f, kLn2High = 0.693115234375f, kLn2Low = 3.19461849e-5f;
  static constexpr float kExp[] = {1.39261761e-3f, 8.36317307e-3f, 4.16665547e-2f, 1.6666577e-1f,
                                   5.0e-1f};
  static constexpr float kTailA[] = {4.1225282e-3f, 4.07000615e-2f, 1.83471861e-1f, 4.38674257e-1f,
                                     5.0e-1f};
  static constexpr float kTailB[] = {1.03335341e-2f, 1.02026065e-1f, 4.70084305e-1f,
                                     1.20358243f,    1.67523342f,    1.0f};
};

template <>
struct ActivationConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kZeroBelow = -747, kOneAbove = 40, kFarTanh = 20, kFarTail = 40;
  static constexpr int kScale = 100, kTailScale = 512;
  static constexpr int64_t kHead = ~int64_t{0x7ffffff};
  static constexpr double kLog2E = 1.4426950408889634, kLn2High = 0.69314718048553913832,
                          kLn2Low = 7.4406171100123967e-11;
  static constexpr double kExp[] = {
      2.5100375832561234e-8, 2.7620075879983367e-7, 2.7557268480310026e-6, 2.4801521322368693e-5,
      1.9841269863040545e-4, 1.3888888917196719e-3, 8.3333333333300644e-3, 4.1666666666624162e-2,
      1.6666666666666667e-1, 5.000000000000001e-1};
  static constexpr double kTailA[] = {1.7473805881181668e-7,
                                      5.6647256828198709e-6,
                                      8.9491910847612563e-5,
                                      8.9851966530890924e-4,
                                      6.3132950570228495e-3,
                                      3.2341430529309371e-2,
                                      1.2225382478338168e-1,
                                      3.3735139825915013e-1,
                                      6.5367139348223827e-1,
                                      8.1128648032441034e-1,
                                      5.0e-1};
  static constexpr double kTailB[] = {
      4.3800335887144716e-7, 1.4199361564669383e-5, 2.2476095743185148e-4, 2.2664541604446337e-3,
      1.6048530822683673e-2, 8.3291800902330206e-2, 3.2182569771011142e-1, 9.2232023759989609e-1,
      1.9155130173865676,    2.7385884734099469,    2.420457521451686,     1.0};
};

// The coefficients begin with that of the highest power. Pairs first: what waits for the result
// waits for half as many steps as in Horner's scheme.
template <class T, int kCount>
inline Vector<T> polynomial(const T (&coefficients)[kCount], Vector<T> x) {
  const Vector<T> square = x * x;
  Vector<T> sum = broadcast(coefficients[0]);
  if constexpr (kCount % 2 == 0) sum = sum * x + coefficients[1];
  for (int i = 2 - kCount % 2; i < kCount; i += 2)
    sum = sum * square + (coefficients[i] * x + coefficients[i + 1]);
  return sum;
}

template <class T>
inline Bits<T> sign_bits(Vector<T> x) {
  using I = typename IntegerOf<sizeof(T)>::type;
  return reinterpret_cast<Bits<T>>(x) & std::numeric_limits<I>::min();
}

template <class T>
inline Vector<T> magnitude(Vector<T> x) {
  return reinterpret_cast<Vector<T>>(reinterpret_cast<Bits<T>>(x) ^ sign_bits<T>(x));
}

// NaN stays NaN.
template <class T>
inline Vector<T> at_most(Vector<T> x, T limit) {
  return x > limit ? broadcast(limit) : x;
}
template <class T>
inline Vector<T> at_least(Vector<T> x, T limit) {
  return x < limit ? broadcast(limit) : x;
}

// exp(a) * 2^kScale = scale + scale * p
template <class T>
struct Exponential {
  Vector<T> p, scale;
  Vector<T> value() const { return scale + scale * p; }
  Vector<T> minus_one() const { return (scale - 1) + scale * p; }
};

// Of a, or of a + rest, where rest is much smaller than 1. 2^(n + kScale) is a normal number.
template <int kScale, class T, class... Rest>
inline Exponential<T> exponential(Vector<T> a, Rest... rest) {
  using C = ActivationConstants<T>;
  const Vector<T> shifted = a * C::kLog2E + C::kRound, n = shifted - C::kRound;
  const Vector<T> r = ((a - n * C::kLn2High - n * C::kLn2Low) + ... + rest);
  return {r + r * r * polynomial(C::kExp, r),
          reinterpret_cast<Vector<T>>((reinterpret_cast<Bits<T>>(shifted) + (C::kBias + kScale))
                                      << C::kMantissa)};
}

// x * x - square, exactly, where `square` is x * x rounded.
template <class T>
inline Vector<T> rest_of_square(Vector<T> x, Vector<T> square) {
#if DECONV_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_fmsub_ps(x, x, square);
  if constexpr (sizeof(T) == 8) return _mm512_fmsub_pd(x, x, square);
#elif DECONV_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) return _mm256_fmsub_ps(x, x, square);
  if constexpr (sizeof(T) == 8) return _mm256_fmsub_pd(x, x, square);
#else
  constexpr auto kHead = ActivationConstants<T>::kHead;
  const Vector<T> head = reinterpret_cast<Vector<T>>(reinterpret_cast<Bits<T>>(x) & kHead);
  return (head * head - square) + (x - head) * (x + head);
#endif
}

template <class T>
constexpr T power_of_two(int n) {
  return n == 0 ? T(1) : n < 0 ? power_of_two<T>(n + 1) / 2 : power_of_two<T>(n - 1) * 2;
}

template <class T>
inline Vector<T> vector_sigmoid(Vector<T> x) {
  using C = ActivationConstants<T>;
  constexpr T kOne = power_of_two<T>(-C::kScale);
  x = at_most<T>(at_least<T>(x, C::kZeroBelow), C::kOneAbove);
  return kOne / (kOne + exponential<-C::kScale, T>(-x).value());
}

template <class T>
inline Vector<T> vector_tanh(Vector<T> x) {
  const Vector<T> u = at_most<T>(magnitude<T>(x), ActivationConstants<T>::kFarTanh);
  const Vector<T> e = exponential<0, T>(2 * u).minus_one(), y = e / (e + 2);
  return reinterpret_cast<Vector<T>>(reinterpret_cast<Bits<T>>(y) | sign_bits<T>(x));
}

template <class T>
inline Vector<T> vector_gelu(Vector<T> x) {
  using C = ActivationConstants<T>;
  constexpr T kUnscaled = power_of_two<T>(-C::kTailScale);
  const Vector<T> size = magnitude<T>(x), u = size > C::kFarTail ? Vector<T>{} : size;
  // exp multiplies the error of its argument, so the square of u is in two parts.
  const Vector<T> square = u * u, rest = rest_of_square<T>(u, square);
  const Exponential<T> e = exponential<C::kTailScale, T>(square * T(-0.5), rest * T(-0.5));
  const Vector<T> tail = e.value() * (u * polynomial(C::kTailA, u) / polynomial(C::kTailB, u));
  // The tail is scaled back last, next to v: numbers below the normal ones are slow.
  const Vector<T> positive = x > 0 ? broadcast(T(1)) : Vector<T>{};
  return x * positive - tail * kUnscaled;
}

template <Activation kActivation, class T>
inline Vector<T> vector_activate(Vector<T> x, T slope) {
  if constexpr (kActivation == Activation::kRelu) return x < 0 ? Vector<T>{} : x;
  if constexpr (kActivation == Activation::kLeakyRelu) return x > 0 ? x : slope * x;
  if constexpr (kActivation == Activation::kSilu) return x * vector_sigmoid<T>(x);
  if constexpr (kActivation == Activation::kGelu) return vector_gelu<T>(x);
  if constexpr (kActivation == Activation::kTanh) return vector_tanh<T>(x);
  if constexpr (kActivation == Activation::kSigmoid) return vector_sigmoid<T>(x);
}

// Some lines of sums; their bias is that of the line, or of the place in it, or null.
template <class T>
struct SumLines {
  T* values;
  int64_t lines, pitch, count;
  const T* bias;
  bool bias_of_line;
};

template <Activation kActivation, class T>
DECONV_PHASE void activate_each(SumLines<T> s, T slope) {
  T* values = s.values;
  for (int64_t line = 0; line < s.lines; ++line, values += s.pitch)
    for (int64_t i = 0; i < s.count; i += kLanes<T>) {
      const int64_t count = min_of<int64_t>(kLanes<T>, s.count - i);
      const bool whole = count == kLanes<T>;
      Vector<T> v = whole ? load_vector(values + i) : load_first<T>(values + i, count);
      if (s.bias) v += s.bias_of_line ? broadcast(s.bias[line]) : load_vector(s.bias + i);
      v = vector_activate<kActivation, T>(v, slope);
      // As from a store that adds a bias of zero to it. (An addition here would be contracted.)
      v = v == 0 ? Vector<T>{} : v;
      whole ? store_vector(values + i, v) : store_first(values + i, v, count);
    }
}

// values[line * pitch + i] = activation(the same + bias[line or i]), i < count. A bias for each
// place of a line has room for whole vectors.
template <class T>
inline void activate_lines(const Params& params, SumLines<T> s) {
  const T slope = static_cast<T>(params.negative_slope);
  switch (params.activation) {
    case Activation::kNone:
      return;  // the store adds the bias
    case Activation::kRelu:
      return activate_each<Activation::kRelu>(s, slope);
    case Activation::kLeakyRelu:
      return activate_each<Activation::kLeakyRelu>(s, slope);
    case Activation::kSilu:
      return activate_each<Activation::kSilu>(s, slope);
    case Activation::kGelu:
      return activate_each<Activation::kGelu>(s, slope);
    case Activation::kTanh:
      return activate_each<Activation::kTanh>(s, slope);
    case Activation::kSigmoid:
      return activate_each<Activation::kSigmoid>(s, slope);
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
