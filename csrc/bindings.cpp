// The only file that knows torch: checks arguments once for all devices, allocates results, fills
// Params, picks the device.
//
// Tensors are 4-D here and carry any strides; unbatched inputs and argument defaults are settled in
// deconv_ext/functional.py.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>
#ifdef DECONV_WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <array>
#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "choices.h"
#include "cpu/output_pool.h"
#include "deconv.h"
#include "log.h"

namespace py = pybind11;
using at::Tensor;
using deconv::Activation;
using deconv::Op;

namespace {

using Pair = std::array<int64_t, 2>;  // height, width
using Crop = std::array<int64_t, 4>;  // top, bottom, left, right

struct Arguments {
  Pair stride;
  Crop padding;
  Pair output_padding, dilation;
  int64_t groups;
};

// What `forward` does to its sums.
struct Epilogue {
  Activation activation = Activation::kNone;
  double negative_slope = 0;
};

// ---------------------------------------------------------------------------------------------------------------------------
// Checks, in torch's words.

void check_arguments(const Arguments& a, const Pair& kernel) {
  for (int axis = 0; axis < 2; ++axis) {
    TORCH_CHECK(a.stride[axis] > 0,
                "non-positive stride is not supported, but got stride=", at::IntArrayRef(a.stride));
    TORCH_CHECK(a.dilation[axis] > 0, "dilation should be greater than zero, but got dilation=",
                at::IntArrayRef(a.dilation));
    TORCH_CHECK(a.output_padding[axis] >= 0,
                "negative output_padding is not supported, but got output_padding=",
                at::IntArrayRef(a.output_padding));
    TORCH_CHECK(kernel[axis] > 0,
                "kernel size should be greater than zero, but got kernel_height: ", kernel[0],
                " kernel_width: ", kernel[1]);
    TORCH_CHECK(
        a.output_padding[axis] < std::max(a.stride[axis], a.dilation[axis]),
        "output padding must be smaller than either stride or dilation, but got output_padding=",
        at::IntArrayRef(a.output_padding), ", stride=", at::IntArrayRef(a.stride),
        ", dilation=", at::IntArrayRef(a.dilation));
  }
  for (int64_t p : a.padding)
    TORCH_CHECK(p >= 0,
                "negative padding is not supported, but got padding=", at::IntArrayRef(a.padding));
  TORCH_CHECK(a.groups > 0, "non-positive groups is not supported, but got groups=", a.groups);
}

// One axis with its output size; sizes are bounded so that index arithmetic cannot overflow.
deconv::Axis make_axis(int axis, int64_t in, int64_t kernel, const Arguments& a) {
  constexpr int64_t kLimit = int64_t{1}
                             << 40;  // elements along one axis, input, output or spread kernel
  const int64_t stride = a.stride[axis], dilation = a.dilation[axis];
  const int64_t begin = a.padding[2 * axis], end = a.padding[2 * axis + 1];
  const char* names[] = {"height", "width"};
  TORCH_CHECK(in <= kLimit && kernel <= kLimit && begin <= kLimit && end <= kLimit &&
                  (in <= 1 || stride <= kLimit / in) &&
                  (kernel <= 1 || dilation <= kLimit / kernel),
              "Storage size calculation overflowed: input ", names[axis], " ", in, ", kernel ",
              kernel, ", stride ", stride, ", dilation ", dilation, ", padding (", begin, ", ", end,
              ") span more than 2^40 elements");
  // A single input or kernel element is never multiplied: clamp what has no effect.
  const int64_t used_stride = std::min(stride, kLimit), used_dilation = std::min(dilation, kLimit);
  const int64_t output_padding = std::min(a.output_padding[axis], kLimit);
  const int64_t out =
      deconv::output_size(in, kernel, used_stride, used_dilation, begin, end, output_padding);
  return {in, out, kernel, used_stride, used_dilation, begin};
}

deconv::Problem make_problem(int64_t batch, int64_t c_in, int64_t c_out, const Pair& input_size,
                             const Pair& kernel, const Arguments& a) {
  check_arguments(a, kernel);
  TORCH_CHECK(
      input_size[0] > 0 && input_size[1] > 0,
      "Only zero batch or zero channel inputs are supported, but got input of spatial size ",
      at::IntArrayRef(input_size));
  const deconv::Problem p{batch,
                          c_in,
                          c_out,
                          a.groups,
                          make_axis(0, input_size[0], kernel[0], a),
                          make_axis(1, input_size[1], kernel[1], a)};
  TORCH_CHECK(p.h.out > 0 && p.w.out > 0, "Given input size per channel: (", p.h.in, " x ", p.w.in,
              "). Calculated output size per channel: (", p.h.out, " x ", p.w.out,
              "). Output size is too small");
  return p;
}

void check_weight(const Tensor& w, int64_t groups) {
  TORCH_CHECK(w.dim() == 4,
              "Expected 4-dimensional weight [in_channels, out_channels/groups, kernel_height, "
              "kernel_width], but got weight of size ",
              w.sizes());
  TORCH_CHECK(groups > 0, "non-positive groups is not supported, but got groups=", groups);
  TORCH_CHECK(w.size(0) >= groups, "Given groups=", groups, ", expected weight to be at least ",
              groups, " at dimension 0, but got weight of size ", w.sizes(), " instead");
  TORCH_CHECK(w.size(0) % groups == 0, "Given groups=", groups,
              ", expected weight to be divisible by ", groups,
              " at dimension 0, but got weight of size ", w.sizes(), " instead");
  TORCH_CHECK(w.size(1) > 0, "non-empty weight expected, but got weight of size ", w.sizes());
}

void check_same_kind(const char* name, const Tensor& t, const Tensor& input) {
  TORCH_CHECK(
      t.device() == input.device(),
      "Expected all tensors to be on the same device, but found at least two devices: input is on ",
      input.device(), ", ", name, " is on ", t.device());
  TORCH_CHECK(t.scalar_type() == input.scalar_type(), "Input type (", input.scalar_type(), ") and ",
              name, " type (", t.scalar_type(), ") should be the same");
}

void check_dim4(const char* name, const Tensor& t) {
  TORCH_CHECK(t.dim() == 4, "Expected 4D (batched) ", name, " to conv_transpose2d, but got ", name,
              " of size: ", t.sizes());
}

deconv::Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return deconv::Dtype::kFloat32;
    case at::kDouble:
      return deconv::Dtype::kFloat64;
    case at::kHalf:
      return deconv::Dtype::kFloat16;
    case at::kBFloat16:
      return deconv::Dtype::kBFloat16;
    case at::kLong:
      return deconv::Dtype::kInt64;
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"conv_transpose2d\" not implemented for '",
                                  t.scalar_type(), "'");
  }
}

Activation activation_named(const std::string& name, const Tensor& input) {
  constexpr std::pair<const char*, Activation> kNames[] = {
      {"relu", Activation::kRelu}, {"leaky_relu", Activation::kLeakyRelu},
      {"silu", Activation::kSilu}, {"gelu", Activation::kGelu},
      {"tanh", Activation::kTanh}, {"sigmoid", Activation::kSigmoid}};
  TORCH_CHECK_NOT_IMPLEMENTED(input.is_floating_point(), "activation='", name,
                              "' needs a floating point dtype, but got input of type ",
                              input.scalar_type());
  std::string names;
  for (const auto& [legal, activation] : kNames) {
    if (name == legal) return activation;
    names += (names.empty() ? "'" : ", '") + std::string(legal) + "'";
  }
  TORCH_CHECK_VALUE(false, "activation must be one of ", names, ", but got activation='", name,
                    "'");
}

// ---------------------------------------------------------------------------------------------------------------------------
// From tensors to Params and back.

deconv::TensorRef ref(const Tensor& t) {
  TORCH_CHECK(t.has_storage() && t.data_ptr() != nullptr,
              "Expected tensors with memory of their own, but got a ", t.toString(), " without");
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// The pool of large results as an allocator of torch's.
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    deconv::cpu::OutputBlock* block = deconv::cpu::acquire_output(bytes);
    report(*block, 1);
    return {block->data, block, &release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* context) {
    auto* block = static_cast<deconv::cpu::OutputBlock*>(context);
    report(*block, -1);
    deconv::cpu::release_output(block);
  }
  static void report(const deconv::cpu::OutputBlock& block, int64_t sign) {
    if (c10::memoryProfilingEnabled())
      c10::reportMemoryUsageToProfiler(block.data, sign * static_cast<int64_t>(block.capacity), 0,
                                       0, at::Device(at::kCPU));
  }
};

// torch's rule: channels_last if one of the two operands is.
Tensor empty_like_operands(at::IntArrayRef sizes, const Tensor& a, const Tensor& b) {
  const bool channels_last = a.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             b.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const at::MemoryFormat format =
      channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  if (a.is_cpu() && c10::multiply_integers(sizes) * a.element_size() >=
                        static_cast<int64_t>(deconv::cpu::kPooledBytes)) {
    static PoolAllocator allocator;
    return at::detail::empty_generic(sizes, &allocator, c10::DispatchKeySet(c10::DispatchKey::CPU),
                                     a.scalar_type(), format);
  }
  return at::empty(sizes, a.options().memory_format(format));
}

template <class Cpu, class Cuda>
void on_device(const Tensor& t, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if (t.is_cpu()) return cpu(at::get_num_threads());
#ifdef DECONV_WITH_CUDA
  if (t.is_cuda()) {
    const c10::cuda::CUDAGuard guard(t.device());
    // Freed at the end of the call, which torch's allocator takes in stream order.
    std::vector<Tensor> workspaces;
    const auto workspace = [&](std::size_t bytes) {
      workspaces.push_back(
          at::empty({static_cast<int64_t>(bytes)},
                    t.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous)));
      return workspaces.back().data_ptr();
    };
    return cuda(deconv::cuda::Context{c10::cuda::getCurrentCUDAStream().stream(), workspace,
                                      at::globalContext().allowTF32CuDNN(at::Float32Op::CONV)});
  }
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, "deconv_ext has no kernels for device ", t.device(),
                              " in this build");
}

// Of deconv_ext.autotune, for the whole process.
deconv::Choices choices;

// Runs what was chosen for the call, if anything was; false if "auto" is to take it. A choice that
// does not take it is stale: made with another version, and forgotten with a warning.
template <class RunWith>
bool run_chosen(Op op, const deconv::Params& params, const Tensor& y, const RunWith& run_with) {
  bool allow_tf32 = false;
#ifdef DECONV_WITH_CUDA
  allow_tf32 = y.is_cuda() && y.scalar_type() == at::kFloat &&
               at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
#endif
  const deconv::Call call = deconv::describe(op, params, y.is_cpu() ? -1 : y.get_device(),
                                             y.is_cpu() ? at::get_num_threads() : 0, allow_tf32);
  const std::string chosen = choices.find(call);
  if (chosen == "auto") return false;
  try {
    run_with(chosen);
  } catch (const std::invalid_argument& error) {
    if (!choices.forget(call)) return false;
    const py::gil_scoped_acquire gil;
    const std::string warning =
        std::string("deconv_ext: a choice recorded by autotune is ignored: ") + error.what();
    if (PyErr_WarnEx(PyExc_UserWarning, warning.c_str(), 1) != 0) throw py::error_already_set();
    return false;
  }
  if (deconv::asked_to_log("config"))
    std::fprintf(stderr, "deconv_ext: %s, as autotune has recorded\n", chosen.c_str());
  return true;
}

void run(Op op, const deconv::Problem& problem, const Tensor& x, const Tensor& w, const Tensor& y,
         const std::optional<Tensor>& bias, const std::string& algo, Epilogue epilogue = {}) {
  const deconv::Params params{problem,
                              dtype_of(y),
                              ref(x),
                              ref(w),
                              ref(y),
                              bias ? bias->data_ptr() : nullptr,
                              bias ? bias->stride(0) : 0,
                              epilogue.activation,
                              epilogue.negative_slope};
  const auto run_with = [&](const std::string& algorithm) {
    on_device(
        y, [&](int threads) { deconv::cpu::run(op, params, algorithm, threads); },
        [&]([[maybe_unused]] const deconv::cuda::Context& context) {
#ifdef DECONV_WITH_CUDA
          deconv::cuda::run(op, params, algorithm, context);
#endif
        });
  };
  try {
    if (algo != "auto" || !choices.in_use() || !run_chosen(op, params, y, run_with)) run_with(algo);
  } catch (const std::invalid_argument& error) {
    TORCH_CHECK(false, error.what());
  }
}

Tensor plain(const Tensor& t) { return t.resolve_conj().resolve_neg(); }

// A complex bilinear map by four real ones: (ar + i ai)(br + i bi).
template <class Bilinear>
Tensor complex_bilinear(const Tensor& a, const Tensor& b, const Bilinear& real) {
  const Tensor pairs_a = at::view_as_real(a), pairs_b = at::view_as_real(b);
  const Tensor a_re = pairs_a.select(-1, 0), a_im = pairs_a.select(-1, 1);
  const Tensor b_re = pairs_b.select(-1, 0), b_im = pairs_b.select(-1, 1);
  const Tensor re = real(a_re, b_re, 0).sub_(real(a_im, b_im, -1));
  const Tensor im = real(a_re, b_im, 1).add_(real(a_im, b_re, -1));
  Tensor result = empty_like_operands(re.sizes(), a, b);
  return at::complex_out(result, re, im);
}

// ---------------------------------------------------------------------------------------------------------------------------
// The operations.

Tensor forward_with(Epilogue epilogue, const Tensor& input, const Tensor& weight,
                    const std::optional<Tensor>& input_bias, Pair stride, Crop padding,
                    Pair output_padding, Pair dilation, int64_t groups, const std::string& algo) {
  check_dim4("input", input);
  check_weight(weight, groups);
  check_same_kind("weight", weight, input);
  const int64_t c_out = weight.size(1) * groups;
  TORCH_CHECK(input.size(1) == weight.size(0), "Given transposed=1, weight of size ",
              weight.sizes(), ", expected input", input.sizes(), " to have ", weight.size(0),
              " channels, but got ", input.size(1), " channels instead");
  if (input_bias) {
    TORCH_CHECK(input_bias->dim() == 1 && input_bias->size(0) == c_out,
                "Given transposed=1, weight of size ", weight.sizes(),
                ", expected bias to be 1-dimensional with ", c_out,
                " elements, but got bias of size ", input_bias->sizes(), " instead");
    check_same_kind("bias", *input_bias, input);
  }
  const Arguments arguments{stride, padding, output_padding, dilation, groups};
  const deconv::Problem problem =
      make_problem(input.size(0), input.size(1), c_out, {input.size(2), input.size(3)},
                   {weight.size(2), weight.size(3)}, arguments);
  const Tensor x = plain(input), w = plain(weight);
  const std::optional<Tensor> bias = input_bias ? std::optional(plain(*input_bias)) : std::nullopt;
  if (x.is_complex()) {
    return complex_bilinear(x, w, [&](const Tensor& a, const Tensor& b, int part) {
      const auto bias_part = bias && part >= 0
                                 ? std::optional(at::view_as_real(*bias).select(-1, part))
                                 : std::nullopt;
      return forward_with(epilogue, a, b, bias_part, stride, padding, output_padding, dilation,
                          groups, algo);
    });
  }
  const Tensor y = empty_like_operands({problem.batch, c_out, problem.h.out, problem.w.out}, x, w);
  if (y.numel() > 0) run(Op::kForward, problem, x, w, y, bias, algo, epilogue);
  return y;
}

Tensor forward(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
               Pair stride, Crop padding, Pair output_padding, Pair dilation, int64_t groups,
               const std::string& algo) {
  return forward_with({}, input, weight, bias, stride, padding, output_padding, dilation, groups,
                      algo);
}

Tensor forward_activated(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias, Pair stride, Crop padding,
                         Pair output_padding, Pair dilation, int64_t groups,
                         const std::string& activation, double negative_slope,
                         const std::string& algo) {
  return forward_with({activation_named(activation, input), negative_slope}, input, weight, bias,
                      stride, padding, output_padding, dilation, groups, algo);
}

void check_grad_output(const Tensor& dy, const deconv::Problem& p) {
  const std::array<int64_t, 4> expected{p.batch, p.c_out, p.h.out, p.w.out};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(expected), "Expected grad_output of size ",
              at::IntArrayRef(expected), ", but got grad_output of size ", dy.sizes());
}

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, Pair input_size, Pair stride,
                  Crop padding, Pair output_padding, Pair dilation, int64_t groups,
                  const std::string& algo) {
  check_dim4("grad_output", grad_output);
  check_weight(weight, groups);
  check_same_kind("weight", weight, grad_output);
  const Arguments arguments{stride, padding, output_padding, dilation, groups};
  const deconv::Problem problem =
      make_problem(grad_output.size(0), weight.size(0), weight.size(1) * groups, input_size,
                   {weight.size(2), weight.size(3)}, arguments);
  check_grad_output(grad_output, problem);
  const Tensor dy = plain(grad_output), w = plain(weight);
  if (dy.is_complex()) {
    return complex_bilinear(dy, w, [&](const Tensor& a, const Tensor& b, int) {
      return grad_input(a, b, input_size, stride, padding, output_padding, dilation, groups, algo);
    });
  }
  const Tensor dx =
      empty_like_operands({problem.batch, problem.c_in, problem.h.in, problem.w.in}, dy, w);
  if (dx.numel() > 0) run(Op::kGradInput, problem, dx, w, dy, std::nullopt, algo);
  return dx;
}

Tensor grad_weight(const Tensor& input, const Tensor& grad_output, Pair kernel_size, Pair stride,
                   Crop padding, Pair output_padding, Pair dilation, int64_t groups,
                   const std::string& algo) {
  check_dim4("input", input);
  check_dim4("grad_output", grad_output);
  check_same_kind("grad_output", grad_output, input);
  const Arguments arguments{stride, padding, output_padding, dilation, groups};
  const deconv::Problem problem =
      make_problem(input.size(0), input.size(1), grad_output.size(1),
                   {input.size(2), input.size(3)}, kernel_size, arguments);
  TORCH_CHECK(problem.c_in % groups == 0 && problem.c_out % groups == 0, "Given groups=", groups,
              ", expected the channels of input and grad_output to be divisible by it, but got ",
              problem.c_in, " and ", problem.c_out);
  check_grad_output(grad_output, problem);
  const Tensor x = plain(input), dy = plain(grad_output);
  if (x.is_complex()) {
    return complex_bilinear(x, dy, [&](const Tensor& a, const Tensor& b, int) {
      return grad_weight(a, b, kernel_size, stride, padding, output_padding, dilation, groups,
                         algo);
    });
  }
  const Tensor dw = empty_like_operands(
      {problem.c_in, problem.c_out / groups, kernel_size[0], kernel_size[1]}, x, dy);
  if (problem.batch == 0) return dw.zero_();
  if (dw.numel() > 0) run(Op::kGradWeight, problem, x, dw, dy, std::nullopt, algo);
  return dw;
}

Tensor grad_bias(const Tensor& grad_output) {
  check_dim4("grad_output", grad_output);
  const Tensor dy = plain(grad_output);
  if (dy.is_complex()) {
    const Tensor pairs = at::view_as_real(dy);
    return at::complex(grad_bias(pairs.select(-1, 0)), grad_bias(pairs.select(-1, 1)));
  }
  if (dy.numel() == 0) return at::zeros({dy.size(1)}, dy.options());
  const Tensor db =
      at::empty({dy.size(1)}, dy.options().memory_format(at::MemoryFormat::Contiguous));
  const deconv::GradBiasParams params{dy.size(0),   dy.size(1), dy.size(2),   dy.size(3),
                                      dtype_of(dy), ref(dy),    db.data_ptr()};
  on_device(
      dy, [&](int threads) { deconv::cpu::grad_bias(params, threads); },
      [&]([[maybe_unused]] const deconv::cuda::Context& context) {
#ifdef DECONV_WITH_CUDA
        deconv::cuda::grad_bias(params, context);
#endif
      });
  return db;
}

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

// A direct call that profilers see as they see the operator's.
template <class... Args>
auto recorded(const char* name, Tensor (*function)(Args...)) {
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

// ---------------------------------------------------------------------------------------------------------------------------
// What tests and tools ask.

Pair output_size(Pair input_size, Pair kernel, Pair stride, Crop padding, Pair output_padding,
                 Pair dilation) {
  const deconv::Problem p =
      make_problem(1, 1, 1, input_size, kernel, {stride, padding, output_padding, dilation, 1});
  return {p.h.out, p.w.out};
}

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
  m.def("forward", recorded("deconv_ext::conv_transpose2d", &forward), "x"_a, "w"_a, "bias"_a,
        "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a, "groups"_a, "algo"_a = "auto",
        nogil);
  m.def("forward_activated", recorded("deconv_ext::conv_transpose2d_activated", &forward_activated),
        "x"_a, "w"_a, "bias"_a, "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a,
        "groups"_a, "activation"_a, "negative_slope"_a, "algo"_a = "auto", nogil);
  m.def("grad_input", recorded("deconv_ext::conv_transpose2d_grad_input", &grad_input), "dy"_a,
        "w"_a, "input_size"_a, "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a,
        "groups"_a, "algo"_a = "auto", nogil);
  m.def("grad_weight", recorded("deconv_ext::conv_transpose2d_grad_weight", &grad_weight), "x"_a,
        "dy"_a, "kernel_size"_a, "stride"_a, "padding"_a, "output_padding"_a, "dilation"_a,
        "groups"_a, "algo"_a = "auto", nogil);
  m.def("grad_bias", recorded("deconv_ext::conv_transpose2d_grad_bias", &grad_bias), "dy"_a, nogil);
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
  m.def("compiled", &compiled);
}
