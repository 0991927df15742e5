// forward with its derivative recorded, for the calls of a usual training step: see autograd.cpp.
#pragma once

#include "operators.h"

namespace deconv {
namespace operators {

// y as torch.autograd is to see it; nothing if the call is not a plain one, so that
// deconv_ext/autograd.py has to take it.
std::optional<Tensor> recorded_forward(const Tensor& input, const Tensor& weight,
                                       const std::optional<Tensor>& bias, Pair stride, Crop padding,
                                       Pair output_padding, Pair dilation, int64_t groups);

}  // namespace operators
}  // namespace deconv
