// The operators on torch's tensors: arguments are checked once for all devices, results allocated,
// Params filled and the device picked.
//
// Tensors are 4-D here and carry any strides; unbatched inputs and argument defaults are settled in
// deconv_ext/functional.py. Derivatives are not recorded here (autograd.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "choices.h"

namespace deconv {

// Of deconv_ext.autotune, for the whole process.
extern Choices choices;

namespace operators {

using at::Tensor;
using Pair = std::array<int64_t, 2>;  // height, width
using Crop = std::array<int64_t, 4>;  // top, bottom, left, right

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               Pair stride, Crop padding, Pair output_padding, Pair dilation, int64_t groups,
               const std::string& algo);

Tensor forward_activated(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, Pair stride, Crop padding,
                         Pair output_padding, Pair dilation, int64_t groups,
                         const std::string& activation, double negative_slope,
                         const std::string& algo);

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, Pair input_size, Pair stride,
                  Crop padding, Pair output_padding, Pair dilation, int64_t groups,
                  const std::string& algo);

Tensor grad_weight(const Tensor& input, const Tensor& grad_output, Pair kernel_size, Pair stride,
                   Crop padding, Pair output_padding, Pair dilation, int64_t groups,
                   const std::string& algo);

Tensor grad_bias(const Tensor& grad_output);

Pair output_size(Pair input_size, Pair kernel, Pair stride, Crop padding, Pair output_padding,
                 Pair dilation);

// As `function`, but profilers see the call as they see the dispatcher's.
template <class... Args>
auto profiled(const char* name, Tensor (*function)(Args...)) {
  return [=](Args... args) {
    at::RecordFunction record(at::RecordScope::FUNCTION);
    std::vector<c10::IValue> inputs;
    if (record.isActive()) {
      if (record.needsInputs()) inputs = {c10::IValue(args)...};
      record.before(name, c10::ArrayRef<const c10::IValue>(inputs.data(), inputs.size()));
    }
    return function(args...);
  };
}

inline const auto profiled_forward = profiled("deconv_ext::conv_transpose2d", &forward);
inline const auto profiled_grad_input =
    profiled("deconv_ext::conv_transpose2d_grad_input", &grad_input);
inline const auto profiled_grad_weight =
    profiled("deconv_ext::conv_transpose2d_grad_weight", &grad_weight);
inline const auto profiled_grad_bias =
    profiled("deconv_ext::conv_transpose2d_grad_bias", &grad_bias);

}  // namespace operators
}  // namespace deconv
