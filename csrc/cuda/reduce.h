// Sums over what lies in several parts, always in the same order.
#pragma once

#include "../deconv.h"

namespace deconv {
namespace cuda {

// db[c] = sum of dy[n, c, h, w]
void reduce_grad_bias(const GradBiasParams& params, const Context& context);

}  // namespace cuda
}  // namespace deconv
