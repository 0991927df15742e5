// The definition, one output element at a time, on host and device: the oracle of every other
// implementation, the last entry of every list of algorithms, and what the vector kernels turn to
// for an element that came out as NaN.
//
//     y[n, co, o]   = activation(bias[co] + sum over ci, k of x[n, ci, i] * w[ci, co, k]),
//                     where i = input_index(o, k) exists
//     dx[n, ci, i]  = sum over co, k of dy[n, co, o] * w[ci, co, k],
//                     where o = output_index(i, k) exists
//     dw[ci, co, k] = sum over n, i of x[n, ci, i] * dy[n, co, o],
//                     where o = output_index(i, k) exists
//
// ci and co run within a group; sums are kept in `Sum`. A sum that became NaN stays NaN, so the
// loops stop there.
#pragma once

#include "../activation.h"
#include "../half.h"
#include "../params.h"

namespace deconv {
namespace reference {

template <class Sum, class T>
DECONV_HOST_DEVICE inline Sum load(const TensorRef& t, int64_t offset) {
  return convert<Sum>(static_cast<const T*>(t.data)[offset]);
}

template <class Sum, class T>
DECONV_HOST_DEVICE Sum forward_element(const Params& p, int64_t n, int64_t co, int64_t oh,
                                       int64_t ow) {
  const Problem& q = p.problem;
  const int64_t group_in = q.c_in / q.groups, group_out = q.c_out / q.groups;
  const int64_t group = co / group_out;
  Sum sum = p.bias ? convert<Sum>(static_cast<const T*>(p.bias)[co * p.bias_stride]) : Sum(0);
  for (int64_t kh = 0; kh < q.h.kernel; ++kh) {
    const int64_t ih = input_index(q.h, oh, kh);
    if (ih < 0) continue;
    for (int64_t kw = 0; kw < q.w.kernel; ++kw) {
      const int64_t iw = input_index(q.w, ow, kw);
      if (iw < 0) continue;
      for (int64_t ci = group * group_in; ci < (group + 1) * group_in; ++ci)
        sum += load<Sum, T>(p.x, p.x.at(n, ci, ih, iw)) *
               load<Sum, T>(p.w, p.w.at(ci, co - group * group_out, kh, kw));
      if (sum != sum) return sum;
    }
  }
  return activate(p.activation, static_cast<Sum>(p.negative_slope), sum);
}

template <class Sum, class T>
DECONV_HOST_DEVICE Sum grad_input_element(const Params& p, int64_t n, int64_t ci, int64_t ih,
                                          int64_t iw) {
  const Problem& q = p.problem;
  const int64_t group_in = q.c_in / q.groups, group_out = q.c_out / q.groups;
  const int64_t first_co = ci / group_in * group_out;
  Sum sum = 0;
  for (int64_t kh = 0; kh < q.h.kernel; ++kh) {
    const int64_t oh = output_index(q.h, ih, kh);
    if (oh < 0) continue;
    for (int64_t kw = 0; kw < q.w.kernel; ++kw) {
      const int64_t ow = output_index(q.w, iw, kw);
      if (ow < 0) continue;
      for (int64_t co = 0; co < group_out; ++co)
        sum += load<Sum, T>(p.y, p.y.at(n, first_co + co, oh, ow)) *
               load<Sum, T>(p.w, p.w.at(ci, co, kh, kw));
      if (sum != sum) return sum;
    }
  }
  return sum;
}

// `co` counts within the group of `ci`, as in the weight.
template <class Sum, class T>
DECONV_HOST_DEVICE Sum grad_weight_element(const Params& p, int64_t ci, int64_t co, int64_t kh,
                                           int64_t kw) {
  const Problem& q = p.problem;
  const int64_t group_in = q.c_in / q.groups, group_out = q.c_out / q.groups;
  const int64_t dy_channel = ci / group_in * group_out + co;
  Sum sum = 0;
  for (int64_t n = 0; n < q.batch; ++n)
    for (int64_t ih = 0; ih < q.h.in; ++ih) {
      const int64_t oh = output_index(q.h, ih, kh);
      if (oh < 0) continue;
      for (int64_t iw = 0; iw < q.w.in; ++iw) {
        const int64_t ow = output_index(q.w, iw, kw);
        if (ow < 0) continue;
        sum += load<Sum, T>(p.x, p.x.at(n, ci, ih, iw)) *
               load<Sum, T>(p.y, p.y.at(n, dy_channel, oh, ow));
      }
      if (sum != sum) return sum;
    }
  return sum;
}

}  // namespace reference
}  // namespace deconv
