// activation.h on the sums that a thread holds in registers.
#pragma once

#include <cuda_runtime_api.h>

#include "../activation.h"

namespace deconv {
namespace cuda {

// values[i] = activation(values[i]), i < kCount.
//
// Registers have no index at run time, and an exponential unrolled for each of 128 sums would be
// tens of kilobytes of code. So the loop takes the first few values, and moves the others up: after
// a whole round each is back at its place.
template <int kCount, class Sum>
__device__ __forceinline__ void activate_all(Activation activation, double negative_slope,
                                             Sum* values) {
  const Sum slope = static_cast<Sum>(negative_slope);
  if (activation == Activation::kRelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = activate(Activation::kRelu, slope, values[i]);
  } else if (activation == Activation::kLeakyRelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = activate(Activation::kLeakyRelu, slope, values[i]);
  } else {
    constexpr int kPower = kCount & -kCount, kFirst = kPower < 8 ? kPower : 8;
#pragma unroll 1
    for (int round = 0; round < kCount / kFirst; ++round) {
      Sum first[kFirst];
#pragma unroll
      for (int i = 0; i < kFirst; ++i) first[i] = activate(activation, slope, values[i]);
#pragma unroll
      for (int i = 0; i < kCount - kFirst; ++i) values[i] = values[i + kFirst];
#pragma unroll
      for (int i = 0; i < kFirst; ++i) values[kCount - kFirst + i] = first[i];
    }
  }
}

}  // namespace cuda
}  // namespace deconv
