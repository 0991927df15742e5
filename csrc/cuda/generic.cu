// "generic": one thread an output element, by the definition in reference/elements.h; any problem,
// any strides, sums in float64 (integers wrap). The oracle of the CUDA kernels, and slow: it reads
// every operand from memory as often as it is used.
#include "../reference/elements.h"
#include "generic.h"
#include "launch.h"
#include "memory.cuh"

namespace deconv {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // threads stride over what is left

struct Elements {
  Params params;
  int64_t sizes[4];  // of the tensor that is written
};

template <class Sum, class T, Op kOp>
__global__ void generic_kernel(Elements e) {
  const int64_t count = e.sizes[0] * e.sizes[1] * e.sizes[2] * e.sizes[3];
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; index < count;
       index += stride) {
    const int64_t i3 = index % e.sizes[3], i2 = index / e.sizes[3] % e.sizes[2];
    const int64_t plane = index / e.sizes[3] / e.sizes[2], i1 = plane % e.sizes[1],
                  i0 = plane / e.sizes[1];
    const Params& p = e.params;
    if constexpr (kOp == Op::kForward) {
      static_cast<T*>(p.y.data)[p.y.at(i0, i1, i2, i3)] =
          convert<T>(reference::forward_element<Sum, T>(p, i0, i1, i2, i3));
    } else if constexpr (kOp == Op::kGradInput) {
      static_cast<T*>(p.x.data)[p.x.at(i0, i1, i2, i3)] =
          convert<T>(reference::grad_input_element<Sum, T>(p, i0, i1, i2, i3));
    } else {
      static_cast<T*>(p.w.data)[p.w.at(i0, i1, i2, i3)] =
          convert<T>(reference::grad_weight_element<Sum, T>(p, i0, i1, i2, i3));
    }
  }
}

// One block a channel; threads sum their share, then halve in a fixed order.
template <class Sum, class T>
__global__ void generic_grad_bias_kernel(GradBiasParams p) {
  Sum* partial = shared_memory<Sum>();  // [kThreads]
  const int64_t channel = blockIdx.x, plane = p.out_h * p.out_w, count = p.batch * plane;
  Sum sum = 0;
  for (int64_t index = threadIdx.x; index < count; index += kThreads)
    sum += reference::load<Sum, T>(
        p.dy, p.dy.at(index / plane, channel, index % plane / p.out_w, index % p.out_w));
  partial[threadIdx.x] = sum;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<T*>(p.db)[channel] = convert<T>(partial[0]);
}

template <class Sum, class T>
void run_typed(Op op, const Elements& e, void* stream) {
  const int64_t count = e.sizes[0] * e.sizes[1] * e.sizes[2] * e.sizes[3];
  const dim3 grid(static_cast<unsigned>(std::min(ceil_div(count, kThreads), kMaxBlocks)));
  switch (op) {
    case Op::kForward:
      return launch(generic_kernel<Sum, T, Op::kForward>, grid, dim3(kThreads), 0, stream, e,
                    "forward_generic");
    case Op::kGradInput:
      return launch(generic_kernel<Sum, T, Op::kGradInput>, grid, dim3(kThreads), 0, stream, e,
                    "grad_input_generic");
    case Op::kGradWeight:
      return launch(generic_kernel<Sum, T, Op::kGradWeight>, grid, dim3(kThreads), 0, stream, e,
                    "grad_weight_generic");
  }
}

template <class Sum, class T>
void grad_bias_typed(const GradBiasParams& p, void* stream) {
  launch(generic_grad_bias_kernel<Sum, T>, dim3(static_cast<unsigned>(p.c_out)), dim3(kThreads),
         kThreads * sizeof(Sum), stream, p, "grad_bias_generic");
}

}  // namespace

void generic(Op op, const Params& params, void* stream) {
  const Problem& q = params.problem;
  Elements e{params, {q.batch, q.c_out, q.h.out, q.w.out}};
  if (op == Op::kGradInput) e = {params, {q.batch, q.c_in, q.h.in, q.w.in}};
  if (op == Op::kGradWeight) e = {params, {q.c_in, q.c_out / q.groups, q.h.kernel, q.w.kernel}};
  switch (params.dtype) {
    case Dtype::kFloat32:
      return run_typed<double, float>(op, e, stream);
    case Dtype::kFloat64:
      return run_typed<double, double>(op, e, stream);
    case Dtype::kFloat16:
      return run_typed<double, Float16>(op, e, stream);
    case Dtype::kBFloat16:
      return run_typed<double, BFloat16>(op, e, stream);
    case Dtype::kInt64:
      return run_typed<uint64_t, int64_t>(op, e, stream);
  }
}

void generic_grad_bias(const GradBiasParams& p, void* stream) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return grad_bias_typed<double, float>(p, stream);
    case Dtype::kFloat64:
      return grad_bias_typed<double, double>(p, stream);
    case Dtype::kFloat16:
      return grad_bias_typed<double, Float16>(p, stream);
    case Dtype::kBFloat16:
      return grad_bias_typed<double, BFloat16>(p, stream);
    case Dtype::kInt64:
      return grad_bias_typed<uint64_t, int64_t>(p, stream);
  }
}

}  // namespace cuda
}  // namespace deconv
