#pragma once

#include "../params.h"

namespace deconv {
namespace cuda {
void generic(Op op, const Params& params, void* stream);
void generic_grad_bias(const GradBiasParams& params, void* stream);
}  // namespace cuda
}  // namespace deconv
