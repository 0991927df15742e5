#include "operators.h"

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/ops/complex.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <torch/csrc/utils/pybind.h>
#ifdef DECONV_WITH_CUDA
#include <ATen/Context.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include <cstdio>
#include <string>
#include <vector>

#include "cpu/output_pool.h"
#include "deconv.h"
#include "log.h"

namespace py = pybind11;
using at::Tensor;

namespace deconv {

// Of deconv_ext.autotune, for the whole process.
Choices choices;

namespace operators {
namespace {

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
Axis make_axis(int axis, int64_t in, int64_t kernel, const Arguments& a) {
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

Problem make_problem(int64_t batch, int64_t c_in, int64_t c_out, const Pair& input_size,
                     const Pair& kernel, const Arguments& a) {
  check_arguments(a, kernel);
  TORCH_CHECK(
      input_size[0] > 0 && input_size[1] > 0,
      "Only zero batch or zero channel inputs are supported, but got input of spatial size ",
      at::IntArrayRef(input_size));
  const Problem p{batch,
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

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Dtype::kFloat32;
    case at::kDouble:
      return Dtype::kFloat64;
    case at::kHalf:
      return Dtype::kFloat16;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    case at::kLong:
      return Dtype::kInt64;
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

TensorRef ref(const Tensor& t) {
  TORCH_CHECK(t.has_storage() && t.data_ptr() != nullptr,
              "Expected tensors with memory of their own, but got a ", t.toString(), " without");
  return {t.data_ptr(), {t.stride(0), t.stride(1), t.stride(2), t.stride(3)}};
}

// The pool of large results as an allocator of torch's.
class PoolAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(std::size_t bytes) override {
    cpu::OutputBlock* block = cpu::acquire_output(bytes);
    report(*block, 1);
    return {block->data, block, &release, at::Device(at::kCPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* context) {
    auto* block = static_cast<cpu::OutputBlock*>(context);
    report(*block, -1);
    cpu::release_output(block);
  }
  static void report(const cpu::OutputBlock& block, int64_t sign) {
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
  if (a.is_cpu() &&
      c10::multiply_integers(sizes) * a.element_size() >= static_cast<int64_t>(cpu::kPooledBytes)) {
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
    return cuda(cuda::Context{c10::cuda::getCurrentCUDAStream().stream(), workspace,
                              at::globalContext().allowTF32CuDNN(at::Float32Op::CONV)});
  }
#endif
  TORCH_CHECK_NOT_IMPLEMENTED(false, "deconv_ext has no kernels for device ", t.device(),
                              " in this build");
}

// Runs what was chosen for the call, if anything was; false if "auto" is to take it. A choice that
// does not take it is stale: made with another version, and forgotten with a warning.
template <class RunWith>
bool run_chosen(Op op, const Params& params, const Tensor& y, const RunWith& run_with) {
  bool allow_tf32 = false;
#ifdef DECONV_WITH_CUDA
  allow_tf32 = y.is_cuda() && y.scalar_type() == at::kFloat &&
               at::globalContext().allowTF32CuDNN(at::Float32Op::CONV);
#endif
  const Call call = describe(op, params, y.is_cpu() ? -1 : y.get_device(),
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
  if (asked_to_log("config"))
    std::fprintf(stderr, "deconv_ext: %s, as autotune has recorded\n", chosen.c_str());
  return true;
}

void run(Op op, const Problem& problem, const Tensor& x, const Tensor& w, const Tensor& y,
         const std::optional<Tensor>& bias, const std::string& algo, Epilogue epilogue = {}) {
  const Params params{problem,
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
        y, [&](int threads) { cpu::run(op, params, algorithm, threads); },
        [&]([[maybe_unused]] const cuda::Context& context) {
#ifdef DECONV_WITH_CUDA
          cuda::run(op, params, algorithm, context);
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
  const Problem problem =
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

void check_grad_output(const Tensor& dy, const Problem& p) {
  const std::array<int64_t, 4> expected{p.batch, p.c_out, p.h.out, p.w.out};
  TORCH_CHECK(dy.sizes() == at::IntArrayRef(expected), "Expected grad_output of size ",
              at::IntArrayRef(expected), ", but got grad_output of size ", dy.sizes());
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------------
// The operations.

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

Tensor grad_input(const Tensor& grad_output, const Tensor& weight, Pair input_size, Pair stride,
                  Crop padding, Pair output_padding, Pair dilation, int64_t groups,
                  const std::string& algo) {
  check_dim4("grad_output", grad_output);
  check_weight(weight, groups);
  check_same_kind("weight", weight, grad_output);
  const Arguments arguments{stride, padding, output_padding, dilation, groups};
  const Problem problem = make_problem(grad_output.size(0), weight.size(0), weight.size(1) * groups,
                                       input_size, {weight.size(2), weight.size(3)}, arguments);
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
  const Problem problem = make_problem(input.size(0), input.size(1), grad_output.size(1),
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
  const GradBiasParams params{dy.size(0),   dy.size(1), dy.size(2),   dy.size(3),
                              dtype_of(dy), ref(dy),    db.data_ptr()};
  on_device(
      dy, [&](int threads) { cpu::grad_bias(params, threads); },
      [&]([[maybe_unused]] const cuda::Context& context) {
#ifdef DECONV_WITH_CUDA
        cuda::grad_bias(params, context);
#endif
      });
  return db;
}

Pair output_size(Pair input_size, Pair kernel, Pair stride, Crop padding, Pair output_padding,
                 Pair dilation) {
  const Problem p =
      make_problem(1, 1, 1, input_size, kernel, {stride, padding, output_padding, dilation, 1});
  return {p.h.out, p.w.out};
}

}  // namespace operators
}  // namespace deconv
