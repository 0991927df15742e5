// activation.h for vectors: what `forward` does to a block of sums while it lies in the cache.
//
// All exponentials are of arguments a <= 0, as exp(a) = 2^n * exp(r), n = round(a / ln 2), with a
// polynomial p(r) = exp(r) - 1 that leaves out nothing next to 1, so that tanh keeps its accuracy
// at zero. For gelu the tail of the normal distribution is exp(-u^2 / 2) times a smooth function:
//
//     gelu(v) = max(v, 0) - u * Q(u)      u = |v|,  Q(u) = erfc(u / sqrt(2)) / 2
//     Q(u) = exp(-u^2 / 2) * t(z) / (u + c)             z = (u - c) / (u + c)
//
// The polynomials interpolate p and t at Chebyshev nodes, with errors below half a unit of T. Each
// result is within a few units of the definition, as far as it is a normal number.
#pragma once

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
  static constexpr float kLeast = -105;       // exp of it is zero
  static constexpr float kFar = 15;           // the tail from there on is zero
  static constexpr int32_t kHead = ~0xfff;    // half of the digits of a number
  // ln 2, the first part so short that products with n are exact
  static constexpr float kLog2E = 1.44269504f, kLn2High = 0.693115234375f, kLn2Low = 3.19461849e-5f;
  static constexpr float kExp[] = {1.39261761e-3f, 8.36317307e-3f, 4.16665547e-2f, 1.6666577e-1f,
                                   5.0e-1f};
  static constexpr float kCentre = 3.0;
  static constexpr float kTail[] = {5.54918717e-5f,  1.33323954e-4f,  -2.44709321e-4f,
                                    -1.03447655e-3f, 1.02415732e-3f,  6.96992015e-3f,
                                    -1.0462289e-2f,  -4.72627619e-2f, 2.30017677e-1f,
                                    -5.09331989e-1f, 7.29083691e-1f};
};

template <>
struct ActivationConstants<double> {
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLeast = -747;
  static constexpr double kFar = 40;
  static constexpr int64_t kHead = ~int64_t{0x7ffffff};
  static constexpr double kLog2E = 1.4426950408889634, kLn2High = 0.69314718048553913832,
                          kLn2Low = 7.4406171100123967e-11;
  static constexpr double kExp[] = {
      2.5100375832561234e-8, 2.7620075879983367e-7, 2.7557268480310026e-6, 2.4801521322368693e-5,
      1.9841269863040545e-4, 1.3888888917196719e-3, 8.3333333333300644e-3, 4.1666666666624162e-2,
      1.6666666666666667e-1, 5.000000000000001e-1};
  static constexpr double kCentre = 4.0;
  static constexpr double kTail[] = {
      -9.990624160023276e-10, -1.015295717649618e-11, 1.3976528155950822e-8, 1.4842390072751343e-8,
      -7.6347128434410861e-8, -1.5461968191221919e-7, 2.6354310560684454e-7, 1.0200713392568464e-6,
      -6.2499069953697852e-7, -5.9190131861540441e-6, 7.1493083254784009e-7, 3.5144214968257804e-5,
      -1.9078434059248705e-6, -2.3109482414997104e-4, 1.3334424978358428e-4, 1.6308184424805886e-3,
      -3.4796923618040596e-3, -7.5401889656250168e-3, 6.0396574890676654e-2, -1.8652185795969339e-1,
      3.8713740074221934e-1,  -6.0789664197189176e-1, 7.5528513041575148e-1};
};

template <class T>
using Bits = Vector<typename IntegerOf<sizeof(T)>::type>;

template <class T>
inline Vector<T> broadcast(T v) {
  return Vector<T>{} + v;
}

// The coefficients begin with that of the highest power.
template <class T, int kCount>
inline Vector<T> polynomial(const T (&coefficients)[kCount], Vector<T> x) {
  Vector<T> sum = broadcast(coefficients[0]);
  for (int i = 1; i < kCount; ++i) sum = sum * x + coefficients[i];
  return sum;
}

// 2^n for whole n whose power is a normal number.
template <class T>
inline Vector<T> power_of_two(Vector<T> n) {
  using C = ActivationConstants<T>;
  return reinterpret_cast<Vector<T>>((reinterpret_cast<Bits<T>>(n + C::kRound) + C::kBias)
                                     << C::kMantissa);
}

template <class T>
inline Vector<T> round_to_whole(Vector<T> x) {
  return x + ActivationConstants<T>::kRound - ActivationConstants<T>::kRound;
}

template <class T>
inline Vector<T> magnitude(Vector<T> x) {
  return x < 0 ? -x : x;
}

// An exponential as (1 + p) * first * second: the powers of two one by one, for their product may
// be too small for a normal number.
template <class T>
struct Exponential {
  Vector<T> p, first, second;
  Vector<T> value() const { return (1 + p) * first * second; }
};

// exp(a + rest), a <= 0, rest much smaller than 1.
template <class T>
inline Exponential<T> exponential(Vector<T> a, Vector<T> rest) {
  using C = ActivationConstants<T>;
  a = a < C::kLeast ? broadcast(C::kLeast) : a;
  const Vector<T> n = round_to_whole<T>((a + rest) * C::kLog2E), half = round_to_whole<T>(n / 2);
  const Vector<T> r = a - n * C::kLn2High - n * C::kLn2Low + rest;
  return {r + r * r * polynomial(C::kExp, r), power_of_two<T>(half), power_of_two<T>(n - half)};
}

template <class T>
inline Vector<T> vector_sigmoid(Vector<T> x) {
  const Vector<T> e = exponential<T>(-magnitude<T>(x), Vector<T>{}).value();
  return (x < 0 ? e : broadcast(T(1))) / (1 + e);
}

template <class T>
inline Vector<T> vector_tanh(Vector<T> x) {
  const Exponential<T> e = exponential<T>(-2 * magnitude<T>(x), Vector<T>{});
  const Vector<T> scale = e.first * e.second, t = scale * e.p + (scale - 1);  // exp(-2|x|) - 1
  // -t / (2 + t), or from about the middle on 1 - 2 (1 + t) / (2 + t), where no error of t matters
  const Vector<T> far = t < T(-0.5) ? broadcast(T(1)) : Vector<T>{};
  const Vector<T> quotient = (far > 0 ? -2 * e.value() : -t) / (2 + t), y = far + quotient;
  return x < 0 ? -y : y;
}

template <class T>
inline Vector<T> vector_gelu(Vector<T> x) {
  using C = ActivationConstants<T>;
  Vector<T> u = magnitude<T>(x);
  u = u > C::kFar ? broadcast(C::kFar) : u;
  // The square of u in two parts, the first of them exact: exp would multiply its error.
  const Vector<T> head = reinterpret_cast<Vector<T>>(reinterpret_cast<Bits<T>>(u) & C::kHead);
  const Exponential<T> e = exponential<T>(head * head * T(-0.5), (u - head) * (u + head) * T(-0.5));
  const Vector<T> inverse = 1 / (u + C::kCentre), z = 1 - 2 * C::kCentre * inverse;
  const Vector<T> tail = e.value() * (polynomial(C::kTail, z) * inverse);
  return x > 0 ? x - u * tail : x * tail;
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
      Vector<T> v = load_vector(values + i);
      if (s.bias) v += s.bias_of_line ? broadcast(s.bias[line]) : load_vector(s.bias + i);
      store_vector(values + i, vector_activate<kActivation, T>(v, slope));
    }
}

// values[line * pitch + i] = activation(the same + bias[line or i]), i < count, in whole vectors:
// values, and a bias for each place of a line, have room for them.
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
