// The functions that `forward` may apply to a sum, bias included, before its one rounding:
//
//     relu        max(v, 0)
//     leaky_relu  v where v > 0, else slope * v
//     sigmoid     1 / (1 + exp(-v))
//     silu        v * sigmoid(v)
//     gelu        v * Phi(v), Phi(v) = erfc(-v / sqrt(2)) / 2 the normal distribution function
//     tanh
//
// These are the definitions, for one value on host or device; cpu/activate.h has them for vectors.
// Written so that nothing cancels or overflows on the way: tails keep their relative accuracy. NaN
// stays NaN, and as in torch silu and gelu make a NaN of -infinity, which is -inf * 0.
#pragma once

#include <cmath>
#include <type_traits>

#include "params.h"

namespace deconv {

template <class T>
DECONV_HOST_DEVICE inline T sigmoid(T v) {
  const T e = std::exp(-std::fabs(v));
  return (v < 0 ? e : T(1)) / (1 + e);
}

template <class T>
DECONV_HOST_DEVICE inline T gelu(T v) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 4)
    return v * normcdff(v);
  else
    return v * normcdf(v);
#else
  return T(0.5) * v * std::erfc(v * T(-0.70710678118654752440));
#endif
}

template <class T>
DECONV_HOST_DEVICE inline T activate(Activation activation, T slope, T v) {
  if constexpr (std::is_floating_point<T>::value) {  // integers have no activations
    switch (activation) {
      case Activation::kNone:
        return v;
      case Activation::kRelu:
        return v < 0 ? T(0) : v;
      case Activation::kLeakyRelu:
        return v > 0 ? v : slope * v;
      case Activation::kSilu:
        return v * sigmoid(v);
      case Activation::kGelu:
        return gelu(v);
      case Activation::kTanh:
        return std::tanh(v);
      case Activation::kSigmoid:
        return sigmoid(v);
    }
  }
  return v;
}

}  // namespace deconv
