// A training step without Python between torch's graph and the kernels.
//
//     y = forward(x, w, bias)
//     dx = grad_input(dy, w),  dw = grad_weight(x, dy),  db = grad_bias(dy)
//
// deconv_ext/autograd.py states the derivatives of every order, in both modes and under every
// transform; a Function of Python's costs more than many a layer, though. The node here takes the
// calls that make up nearly all of training: real tensors with memory of their own, nobody looking
// on. For anything else in the backward pass, a graph of the gradients above all, it asks
// autograd.py.
#include "autograd.h"

#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/PythonDispatcherTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace deconv {
namespace operators {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Whether a call goes from torch's dispatcher to the kernels by way of autograd alone: no
// transform, mode, tracer or inference mode. (autocast has had its say in
// deconv_ext/functional.py.)
bool nobody_looks_on() {
  constexpr c10::DispatchKeySet autocast = c10::autocast_dispatch_keyset;
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  return keys.included_ == c10::default_included_set &&
         (keys.excluded_ | autocast) == (c10::default_excluded_set | autocast) &&
         c10::impl::PythonDispatcherTLS::get_state() == nullptr;
}

// A real tensor of strided memory on a CPU or a GPU: no wrapper, no tangent, nothing lazy.
bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet usual = [] {
    c10::DispatchKeySet keys{c10::DispatchKey::CPU, c10::DispatchKey::CUDA,
                             c10::DispatchKey::ADInplaceOrView};
    for (const c10::DispatchKey key : {c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) {
      const c10::BackendComponent backend = c10::toBackendComponent(key);
      keys = keys | c10::getAutogradRelatedKeySetFromBackend(backend) |
             c10::getAutocastRelatedKeySetFromBackend(backend);
    }
    return keys;
  }();
  return (t.key_set().raw_repr() & ~usual.raw_repr()) == 0 && !t.is_complex() &&
         !t._fw_grad(/*level=*/0).defined();
}

// What the backward pass has to know beside the operands; numbers alone, so that torch can keep it.
struct Geometry {
  Pair input_size, kernel_size, stride;
  Crop padding;
  Pair output_padding, dilation;
  int64_t groups, has_bias;

  static constexpr std::size_t kNumbers = 16;

  std::vector<int64_t> numbers() const {
    static_assert(sizeof(Geometry) == kNumbers * sizeof(int64_t));
    std::vector<int64_t> list(kNumbers);
    std::memcpy(list.data(), this, sizeof(Geometry));
    return list;
  }

  static Geometry from(const c10::List<int64_t>& list) {
    Geometry geometry{};
    std::copy(list.begin(), list.end(), reinterpret_cast<int64_t*>(&geometry));
    return geometry;
  }
};

using Wanted = std::array<bool, 3>;  // dx, dw, db

Tensor call_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias,
                    const Geometry& g) {
  return profiled_forward(x, w, bias, g.stride, g.padding, g.output_padding, g.dilation, g.groups,
                          "auto");
}

variable_list call_gradients(const Tensor& dy, const Tensor& x, const Tensor& w, const Geometry& g,
                             const Wanted& wanted) {
  variable_list gradients(3);
  if (wanted[0])
    gradients[0] = profiled_grad_input(dy, w, g.input_size, g.stride, g.padding, g.output_padding,
                                       g.dilation, g.groups, "auto");
  if (wanted[1])
    gradients[1] = profiled_grad_weight(x, dy, g.kernel_size, g.stride, g.padding, g.output_padding,
                                        g.dilation, g.groups, "auto");
  if (wanted[2]) gradients[2] = profiled_grad_bias(dy);
  return gradients;
}

variable_list ask_python(const Tensor& dy, const Tensor& x, const Tensor& w, const Geometry& g,
                         const Wanted& wanted) {
  const py::gil_scoped_acquire gil;
  const auto operand = [](const Tensor& t) { return t.defined() ? py::cast(t) : py::none(); };
  const auto tuple = [](const auto& values) { return py::tuple(py::cast(values)); };
  const py::tuple arguments = py::make_tuple(tuple(g.stride), tuple(g.padding),
                                             tuple(g.output_padding), tuple(g.dilation), g.groups);
  const py::object results = py::module_::import("deconv_ext.autograd")
                                 .attr("gradients")(dy, operand(x), operand(w), tuple(g.input_size),
                                                    tuple(g.kernel_size), arguments, wanted);
  variable_list gradients;
  for (const py::handle result : results)
    gradients.push_back(result.is_none() ? Tensor() : result.cast<Tensor>());
  return gradients;
}

class ConvTranspose2d : public torch::autograd::Function<ConvTranspose2d> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w,
                        const std::optional<Tensor>& bias, const Geometry& g) {
    // Each operand is kept only if the derivative for the other one may be asked for.
    ctx->save_for_backward({w.requires_grad() ? x : Tensor(), x.requires_grad() ? w : Tensor()});
    ctx->saved_data["geometry"] = g.numbers();
    ctx->set_materialize_grads(false);
    return call_forward(x, w, bias, g);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor& dy = grads[0];
    if (!dy.defined()) return variable_list(4);
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &w = saved[1];
    const Geometry g = Geometry::from(ctx->saved_data["geometry"].toIntList());
    const Wanted wanted{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                        g.has_bias && ctx->needs_input_grad(2)};
    const bool plain = !at::GradMode::is_enabled() && nobody_looks_on() && is_plain(dy) &&
                       (!x.defined() || is_plain(x)) && (!w.defined() || is_plain(w));
    variable_list gradients = (plain ? call_gradients : ask_python)(dy, x, w, g, wanted);
    gradients.emplace_back();  // of what is no tensor
    return gradients;
  }
};

}  // namespace

std::optional<Tensor> recorded_forward(const Tensor& x, const Tensor& w,
                                       const std::optional<Tensor>& bias, Pair stride, Crop padding,
                                       Pair output_padding, Pair dilation, int64_t groups) {
  if (x.dim() != 4 || w.dim() != 4 || !nobody_looks_on() || !is_plain(x) || !is_plain(w) ||
      (bias && !is_plain(*bias)))
    return std::nullopt;
  const Geometry g{{x.size(2), x.size(3)},
                   {w.size(2), w.size(3)},
                   stride,
                   padding,
                   output_padding,
                   dilation,
                   groups,
                   bias.has_value()};
  if (!at::GradMode::is_enabled() ||
      !(x.requires_grad() || w.requires_grad() || (bias && bias->requires_grad())))
    return call_forward(x, w, bias, g);
  return ConvTranspose2d::apply(x, w, bias, g);
}

}  // namespace operators
}  // namespace deconv
