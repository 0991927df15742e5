// "depthwise": one channel a group and channels innermost in memory (channels_last): lanes are channels.
//
//     forward       y[n, oh, ow, :]  = bias + sum over taps of w[k, :] * x[n, ih, iw, :]
//     grad_input    dx[n, ih, iw, :] =        sum over taps of w[k, :] * dy[n, oh, ow, :]
//     grad_weight   dw[k, :]         =        sum over n, ih, iw of x[n, ih, iw, :] * dy[n, oh, ow, :]
//
// The weight is transposed to [k][channel] once; taps are clipped to the image.
#pragma once

#include "direct.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct Depthwise {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  static constexpr int kVectors = 4;  // of sums held in registers

  const Params& params;
  const Problem& p = params.problem;
  T* weights;  // [kernel_h][kernel_w][channels]

  void pack_weights() const {
    for (int64_t kh = 0; kh < p.h.kernel; ++kh)
      for (int64_t kw = 0; kw < p.w.kernel; ++kw)
        for (int64_t c = 0; c < p.c_in; ++c)
          weights[(kh * p.w.kernel + kw) * p.c_in + c] = convert<T>(static_cast<const S*>(params.w.data)[params.w.at(c, 0, kh, kw)]);
  }

  // sum over the listed taps of weight * source, for `count` <= kVectors * kN channels from c on
  struct Term {
    const S* source;
    const T* weight;
  };
  static void sum_terms(const Term* terms, int64_t count, int64_t c, int64_t channels, const T* start, S* __restrict to) {
    T sums[kVectors * kN];
    if (channels == kVectors * kN) {
      for (int i = 0; i < kVectors * kN; ++i) sums[i] = start[c + i];
      for (int64_t t = 0; t < count; ++t)
        for (int i = 0; i < kVectors * kN; ++i) sums[i] += terms[t].weight[c + i] * convert<T>(terms[t].source[c + i]);
      for (int i = 0; i < kVectors * kN; ++i) to[c + i] = convert<S>(sums[i]);
      return;
    }
    for (int64_t i = 0; i < channels; ++i) {
      T sum = start[c + i];
      for (int64_t t = 0; t < count; ++t) sum += terms[t].weight[c + i] * convert<T>(terms[t].source[c + i]);
      to[c + i] = convert<S>(sum);
    }
  }

  // One row of y or dx. `start` is what a sum begins with: the bias or zeros, [channels].
  void row(Op op, int64_t n, int64_t line, const T* start) const {
    const bool forward = op == Op::kForward;
    const TensorRef &source = forward ? params.x : params.y, &target = forward ? params.y : params.x;
    const auto found = [&](const Axis& axis, int64_t at, int64_t k) { return forward ? input_index(axis, at, k) : output_index(axis, at, k); };
    Term* terms = static_cast<Term*>(thread_scratch(p.h.kernel * p.w.kernel * sizeof(Term)));
    const int64_t width = forward ? p.w.out : p.w.in;
    for (int64_t column = 0; column < width; ++column) {
      int64_t count = 0;
      for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
        const int64_t h = found(p.h, line, kh);
        if (h < 0) continue;
        for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
          const int64_t w = found(p.w, column, kw);
          if (w < 0) continue;
          terms[count++] = {static_cast<const S*>(source.data) + source.at(n, 0, h, w), weights + (kh * p.w.kernel + kw) * p.c_in};
        }
      }
      S* to = static_cast<S*>(target.data) + target.at(n, 0, line, column);
      const int64_t block = kVectors * kN;
      for (int64_t c = 0; c < p.c_in; c += block) sum_terms(terms, count, c, min_of(block, p.c_in - c), start, to);
    }
  }

  // dw of one kernel row for up to kN channels from c on: sums of a line in lanes, added to the total after each.
  void grad_weight_row(int64_t c, int64_t kh) const {
    const int64_t channels = min_of<int64_t>(kN, p.c_in - c);
    Carver carver(thread_scratch(2 * p.w.kernel * kN * sizeof(T)));
    T *total = carver.take<T>(p.w.kernel * kN), *sums = carver.take<T>(p.w.kernel * kN);
    for (int64_t i = 0; i < p.w.kernel * kN; ++i) total[i] = 0;
    const Range lines = inputs_of(p.h, kh);
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t ih = lines.begin; ih < lines.end; ++ih) {
        const int64_t oh = output_index(p.h, ih, kh);
        for (int64_t i = 0; i < p.w.kernel * kN; ++i) sums[i] = 0;
        for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
          const Range inputs = inputs_of(p.w, kw);
          const S* x = static_cast<const S*>(params.x.data) + params.x.at(n, c, ih, inputs.begin);
          const S* dy = static_cast<const S*>(params.y.data) +
                        params.y.at(n, c, oh, inputs.begin * p.w.stride + kw * p.w.dilation - p.w.pad);
          add_lanes(sums + kw * kN, x, params.x.stride[3], dy, params.y.stride[3] * p.w.stride, inputs.end - inputs.begin, channels);
        }
        for (int64_t i = 0; i < p.w.kernel * kN; ++i) total[i] += sums[i];
      }
    for (int64_t kw = 0; kw < p.w.kernel; ++kw)
      for (int64_t i = 0; i < channels; ++i)
        static_cast<S*>(params.w.data)[params.w.at(c + i, 0, kh, kw)] = convert<S>(total[kw * kN + i]);
  }

  static void add_lanes(T* sums, const S* x, int64_t x_step, const S* dy, int64_t dy_step, int64_t count, int64_t channels) {
    T sum[kN];
    for (int i = 0; i < kN; ++i) sum[i] = sums[i];
    for (int64_t pixel = 0; pixel < count; ++pixel, x += x_step, dy += dy_step) {
      if (channels == kN) {
        for (int i = 0; i < kN; ++i) sum[i] += convert<T>(x[i]) * convert<T>(dy[i]);
      } else {
        for (int64_t i = 0; i < channels; ++i) sum[i] += convert<T>(x[i]) * convert<T>(dy[i]);
      }
    }
    for (int i = 0; i < kN; ++i) sums[i] = sum[i];
  }
};

template <class S>
void depthwise(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const Problem& p = params.problem;
  if (op == Op::kGradWeight) {
    const Depthwise<S> kernel{params, params.problem, nullptr};
    parallel_for((p.c_in + kLanes<T> - 1) / kLanes<T> * p.h.kernel, threads,
                 [&](int64_t task) { kernel.grad_weight_row(task / p.h.kernel * kLanes<T>, task % p.h.kernel); });
    return;
  }
  const int64_t elements = p.h.kernel * p.w.kernel * p.c_in;
  T* packed = static_cast<T*>(call_scratch((elements + p.c_in) * sizeof(T)));
  T* start = packed + elements;
  for (int64_t c = 0; c < p.c_in; ++c)
    start[c] = op == Op::kForward && params.bias ? convert<T>(static_cast<const S*>(params.bias)[c * params.bias_stride]) : T(0);
  const Depthwise<S> kernel{params, params.problem, packed};
  kernel.pack_weights();
  const int64_t rows = op == Op::kForward ? p.h.out : p.h.in;
  parallel_for(p.batch * rows, threads, [&](int64_t task) { kernel.row(op, task / rows, task % rows, start); });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
