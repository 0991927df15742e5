// What a kernel is given: the problem, three operands with their strides, and nothing of torch.
//
// The three operations are the three gradients of one trilinear form <dy, deconv(x, w)>, so they
// share one struct:
//
//     forward      reads x, w (and bias)   writes y
//     grad_input   reads y = dy, w         writes x = dx
//     grad_weight  reads x, y = dy         writes w = dw
#pragma once

#include "geometry.h"

namespace deconv {

enum class Dtype { kFloat32, kFloat64, kFloat16, kBFloat16, kInt64 };

enum class Op { kForward, kGradInput, kGradWeight };

// What `forward` does to each sum, bias included, before it is rounded (activation.h).
enum class Activation { kNone, kRelu, kLeakyRelu, kSilu, kGelu, kTanh, kSigmoid };

// Any strided tensor of four axes; strides in elements. x, y: [n, c, h, w]; w: [c_in, c_out /
// groups, kernel_h, kernel_w].
struct TensorRef {
  void* data;
  int64_t stride[4];

  DECONV_HOST_DEVICE int64_t at(int64_t i0, int64_t i1, int64_t i2, int64_t i3) const {
    return i0 * stride[0] + i1 * stride[1] + i2 * stride[2] + i3 * stride[3];
  }
};

struct Params {
  Problem problem;
  Dtype dtype;
  TensorRef x, w, y;
  const void* bias;  // [c_out] or null
  int64_t bias_stride;
  Activation activation;  // of forward; kNone for the gradients
  double negative_slope;  // of kLeakyRelu
};

// Elements of what forward or grad_input writes.
inline int64_t result_elements(Op op, const Problem& p) {
  return p.batch * (op == Op::kForward ? p.c_out * p.h.out * p.w.out : p.c_in * p.h.in * p.w.in);
}

// db[c] = sum of dy[n, c, h, w] over n, h, w
struct GradBiasParams {
  int64_t batch, c_out, out_h, out_w;
  Dtype dtype;
  TensorRef dy;
  void* db;  // [c_out], contiguous
};

}  // namespace deconv
