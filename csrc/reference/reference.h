// The naive implementation on the CPU: elements.h in a loop, sums in float64 (unsigned 64-bit for
// integers: they wrap). Takes every problem.
#pragma once

#include "../params.h"

namespace deconv {
namespace reference {
void run(Op op, const Params& params, int threads);
void grad_bias(const GradBiasParams& params);  // integers only
}  // namespace reference
}  // namespace deconv
