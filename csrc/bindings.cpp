// What Python sees of the kernels: functions of the binary module, and the same as operators of
// torch's dispatcher.
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>
#include <vector>

#include "autograd.h"
#include "cpu/output_pool.h"
#include "deconv.h"
#include "log.h"
#include "operators.h"

namespace py = pybind11;
using at::Tensor;
using deconv::choices;
using deconv::Op;
using namespace deconv::operators;

namespace {

// ---------------------------------------------------------------------------------------------------------------------------
// The same as operators of torch's dispatcher, for whatever traces, exports or intercepts calls.
// Fake kernels and derivatives are in deconv_ext/ops.py.

template <std::size_t n>
std::array<int64_t, n> as_array(const char* name, at::IntArrayRef values) {
  TORCH_CHECK(values.size() == n, "Expected ", n, " values of ", name, ", but got ", name, "=",
              values);
  std::array<int64_t, n> array;
  std::copy(values.begin(), values.end(), array.begin());
  return array;
}

Tensor forward_op(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                  at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef output_padding,
                  at::IntArrayRef dilation, int64_t groups) {
  return forward(input, weight, bias, as_array<2>("stride", stride),
                 as_array<4>("padding", padding), as_array<2>("output_padding", output_padding),
                 as_array<2>("dilation", dilation), groups, "auto");
}

Tensor forward_activated_op(const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, at::IntArrayRef stride,
                            at::IntArrayRef padding, at::IntArrayRef output_padding,
                            at::IntArrayRef dilation, int64_t groups, std::string_view activation,
                            double negative_slope) {
  return forward_activated(
      input, weight, bias, as_array<2>("stride", stride), as_array<4>("padding", padding),
      as_array<2>("output_padding", output_padding), as_array<2>("dilation", dilation), groups,
      std::string(activation), negative_slope, "auto");
}

template <auto gradient>  // of the input or of the weight
Tensor gradient_op(const Tensor& a, const Tensor& b, at::IntArrayRef size, at::IntArrayRef stride,
                   at::IntArrayRef padding, at::IntArrayRef output_padding,
                   at::IntArrayRef dilation, int64_t groups) {
  return gradient(a, b, as_array<2>("size", size), as_array<2>("stride", stride),
                  as_array<4>("padding", padding), as_array<2>("output_padding", output_padding),
                  as_array<2>("dilation", dilation), groups, "auto");
}

TORCH_LIBRARY(deconv_ext, m) {
  // Results take their memory format from the operands, so nobody may change strides under way.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order};
  m.def(
      "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] output_padding, SymInt[2] dilation, SymInt groups) -> Tensor",
      tags);
  m.def(
      "conv_transpose2d_activated(Tensor input, Tensor weight, Tensor? bias, SymInt[2] stride, "
      "SymInt[4] padding, SymInt[2] output_padding, SymInt[2] dilation, SymInt groups, "
      "str activation, float negative_slope) -> Tensor",
      tags);
  m.def(
      "conv_transpose2d_grad_input(Tensor grad_output, Tensor weight, SymInt[2] input_size, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] output_padding, SymInt[2] dilation, "
      "SymInt groups) -> Tensor",
      tags);
  m.def(
      "conv_transpose2d_grad_weight(Tensor input, Tensor grad_output, SymInt[2] kernel_size, "
      "SymInt[2] stride, SymInt[4] padding, SymInt[2] output_padding, SymInt[2] dilation, "
      "SymInt groups) -> Tensor",
      tags);
  m.def("conv_transpose2d_grad_bias(Tensor grad_output) -> Tensor", tags);
}

void implement(torch::Library& m) {
  m.impl("conv_transpose2d", &forward_op);
  m.impl("conv_transpose2d_activated", &forward_activated_op);
  m.impl("conv_transpose2d_grad_input", &gradient_op<&grad_input>);
  m.impl("conv_transpose2d_grad_weight", &gradient_op<&grad_weight>);
  m.impl("conv_transpose2d_grad_bias", &grad_bias);
}

TORCH_LIBRARY_IMPL(deconv_ext, CPU, m) { implement(m); }
#ifdef DECONV_WITH_CUDA
TORCH_LIBRARY_IMPL(deconv_ext, CUDA, m) { implement(m); }
#endif

// ---------------------------------------------------------------------------------------------------------------------------
// What tests and tools ask.

py::dict tap_table(int64_t in, int64_t kernel, int64_t stride, int64_t dilation, int64_t pad_begin,
                   int64_t pad_end, int64_t output_padding) {
  const int64_t out =
      deconv::output_size(in, kernel, stride, dilation, pad_begin, pad_end, output_padding);
  const deconv::Axis axis{in, out, kernel, stride, dilation, pad_begin};
  py::list phases;
  for (int64_t r = 0; r < stride; ++r) {
    py::list taps;
    for (const deconv::Tap& tap : deconv::phase_taps(axis, r))
      taps.append(py::make_tuple(tap.k, tap.offset));
    phases.append(taps);
  }
  py::dict table;
  table["out"] = out;
  table["phases"] = phases;
  return table;
}

Op op_named(const std::string& name) {
  for (Op op : {Op::kForward, Op::kGradInput, Op::kGradWeight})
    if (name == deconv::op_name(op)) return op;
  throw py::value_error("op must be 'forward', 'grad_input' or 'grad_weight', but got '" + name +
                        "'");
}

std::vector<std::string> list_algorithms(const std::string& op, const std::string& device) {
  if (device == "cpu") return deconv::cpu::algorithms(op_named(op));
#ifdef DECONV_WITH_CUDA
  if (device == "cuda") return deconv::cuda::algorithms(op_named(op));
#endif
  return {};
}

#ifndef DECONV_CUDA_ARCHS
#define DECONV_CUDA_ARCHS ""
#endif

py::dict compiled() {
  py::dict facts;
#if defined(__clang__)
  facts["compiler"] = "clang " __clang_version__;
#else
  facts["compiler"] = "g++ " __VERSION__;
#endif
#ifdef _GLIBCXX_USE_CXX11_ABI
  facts["cxx11_abi"] = static_cast<bool>(_GLIBCXX_USE_CXX11_ABI);
#else
  facts["cxx11_abi"] = true;
#endif
#ifdef DECONV_WITH_CUDA
  facts["with_cuda"] = true;
#else
  facts["with_cuda"] = false;
#endif
  facts["cuda_archs"] = DECONV_CUDA_ARCHS;
  facts["openmp"] = _OPENMP;
  facts["torch_version"] = TORCH_VERSION;
  return facts;
}

}  // namespace

// Calls run without the GIL as it is; what they share is atomic, locked or a thread's own.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m, py::mod_gil_not_used()) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> nogil;
  m.doc() = "Kernels of deconv_ext; use deconv_ext.functional instead of calling these directly.";
  m.def("forward", profiled_forward, "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a, "groups"_a, "algo"_a = "auto", nogil);
  m.def("forward_activated", profiled("deconv_ext::conv_transpose2d_activated", &forward_activated),
        "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a,
        "groups"_a, "activation"_a, "negative_slope"_a, "algo"_a = "auto", nogil);
  m.def("grad_input", profiled_grad_input, "dy"_a, "w"_a, "input_size"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a, "groups"_a, "algo"_a = "auto", nogil);
  m.def("grad_weight", profiled_grad_weight, "x"_a, "dy"_a, "kernel_size"_a, "stride"_a,
        "padding"_a, "output_padding"_a, "dilation"_a, "groups"_a, "algo"_a = "auto", nogil);
  m.def("grad_bias", profiled_grad_bias, "dy"_a, nogil);
  m.def("recorded_forward", &recorded_forward, "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a, "groups"_a, nogil);
  m.def("output_size", &output_size, "input_size"_a, "kernel_size"_a, "stride"_a, "padding"_a,
        "output_padding"_a, "dilation"_a);
  m.def("tap_table", &tap_table, "size_in"_a, "kernel"_a, "stride"_a, "dilation"_a, "pad_begin"_a,
        "pad_end"_a, "output_padding"_a);
  m.def("list_algorithms", &list_algorithms, "op"_a, "device"_a = "cpu");
  m.def(
      "set_choices",
      [](const std::map<deconv::Call, std::string>& algorithms) { choices.set(algorithms); },
      "algorithms"_a, nogil);
  m.def("record_calls", [](bool enabled) { return choices.record(enabled); }, "enabled"_a, nogil);
  m.def("cpu_isas", &deconv::cpu::isas);
  m.def("cpu_isa", &deconv::cpu::isa);
  m.def("set_cpu_isa", &deconv::cpu::set_isa, "name"_a);
  m.def("idle_output_bytes", &deconv::cpu::idle_output_bytes);
  m.def("empty_output_pool", &deconv::cpu::empty_output_pool);
  m.def("streamed_from", &deconv::cpu::streamed_from);
  m.def("set_streamed_from", &deconv::cpu::set_streamed_from, "bytes"_a);
  m.def("compiled", &compiled);
}
