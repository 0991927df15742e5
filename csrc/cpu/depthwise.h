// "depthwise": one channel a group and channels innermost in memory (channels_last): lanes are
// channels.
//
//     forward       y[n, oh, ow, :]  = activation(bias + sum of w[k, :] * x[n, ih, iw, :]),
//                                      over taps
//     grad_input    dx[n, ih, iw, :] = sum of w[k, :] * dy[n, oh, ow, :], over taps
//     grad_weight   dw[k, :]         = sum of x[n, ih, iw, :] * dy[n, oh, ow, :], over n, ih, iw
//
// The weight is transposed to [k][channel] once; taps are clipped to the image.
#pragma once

#include "activate.h"
#include "direct_weight.h"

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
          weights[(kh * p.w.kernel + kw) * p.c_in + c] =
              convert<T>(static_cast<const S*>(params.w.data)[params.w.at(c, 0, kh, kw)]);
  }

  // A tap along one axis: element offsets of what it reads.
  struct Term {
    int64_t source, weight;
  };
  struct Terms {
    const Term* list;
    int64_t count;
  };

  // The activation of finished sums, the bias among their terms.
  template <int Vectors>
  void activate(Vector<T> (&sums)[Vectors]) const {
    if (params.activation == Activation::kNone) return;
    T values[Vectors * kN];
    for (int v = 0; v < Vectors; ++v) store_vector(values + v * kN, sums[v]);
    activate_lines<T>(params, {values, 1, 0, Vectors * kN, nullptr, false});
    for (int v = 0; v < Vectors; ++v) sums[v] = load_vector(values + v * kN);
  }

  // to[c + i] = start[c + i] + sum over both axes' terms of weight * source, i < Vectors * kN
  template <int Vectors>
  void sum_terms(Terms h, Terms w, const S* source, int64_t c, const T* start, S* to) const {
    Vector<T> sums[Vectors];
    for (int v = 0; v < Vectors; ++v) sums[v] = load_vector(start + c + v * kN);
    for (int64_t i = 0; i < h.count; ++i)
      for (int64_t j = 0; j < w.count; ++j) {
        const S* x = source + h.list[i].source + w.list[j].source + c;
        const T* weight = weights + h.list[i].weight + w.list[j].weight + c;
        for (int v = 0; v < Vectors; ++v)
          sums[v] += load_vector(weight + v * kN) * load_as<T>(x + v * kN);
      }
    activate(sums);
    for (int v = 0; v < Vectors; ++v)
      for (int i = 0; i < kN; ++i) to[c + v * kN + i] = convert<S>(sums[v][i]);
  }

  void sum_terms_of_one(Terms h, Terms w, const S* source, int64_t c, const T* start, S* to) const {
    T sum = start[c];
    for (int64_t i = 0; i < h.count; ++i)
      for (int64_t j = 0; j < w.count; ++j)
        sum += weights[h.list[i].weight + w.list[j].weight + c] *
               convert<T>(source[h.list[i].source + w.list[j].source + c]);
    if (params.activation != Activation::kNone) {
      Vector<T> lanes[1] = {broadcast(sum)};
      activate(lanes);
      sum = lanes[0][0];
    }
    to[c] = convert<S>(sum);
  }

  // The taps that reach index `at` of the target.
  static Terms find_terms(bool forward, const Axis& axis, int64_t at, int64_t source_stride,
                          int64_t weight_stride, Term* list) {
    int64_t count = 0;
    for (int64_t k = 0; k < axis.kernel; ++k) {
      const int64_t i = forward ? input_index(axis, at, k) : output_index(axis, at, k);
      if (i >= 0) list[count++] = {i * source_stride, k * weight_stride};
    }
    return {list, count};
  }

  // One row of y or dx. `start` is what a sum begins with: the bias or zeros, [channels].
  void row(Op op, int64_t n, int64_t line, const T* start) const {
    const bool forward = op == Op::kForward;
    const TensorRef &source = forward ? params.x : params.y,
                    &target = forward ? params.y : params.x;
    Carver carver(thread_scratch((p.h.kernel + p.w.kernel) * sizeof(Term) + 64));
    Term *list_h = carver.take<Term>(p.h.kernel), *list_w = carver.take<Term>(p.w.kernel);
    const Terms h = find_terms(forward, p.h, line, source.stride[2], p.w.kernel * p.c_in, list_h);
    const S* image = static_cast<const S*>(source.data) + source.at(n, 0, 0, 0);
    const int64_t width = forward ? p.w.out : p.w.in;
    for (int64_t column = 0; column < width; ++column) {
      const Terms w = find_terms(forward, p.w, column, source.stride[3], p.c_in, list_w);
      S* to = static_cast<S*>(target.data) + target.at(n, 0, line, column);
      int64_t c = 0;
      for (; c + kVectors * kN <= p.c_in; c += kVectors * kN)
        sum_terms<kVectors>(h, w, image, c, start, to);
      for (; c + kN <= p.c_in; c += kN) sum_terms<1>(h, w, image, c, start, to);
      for (; c < p.c_in; ++c) sum_terms_of_one(h, w, image, c, start, to);
    }
  }

  // dw of one kernel row for up to kN channels from c on: sums of a line in lanes, added to the
  // total after each.
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
          const S* dy =
              static_cast<const S*>(params.y.data) +
              params.y.at(n, c, oh, inputs.begin * p.w.stride + kw * p.w.dilation - p.w.pad);
          add_lanes(sums + kw * kN, x, params.x.stride[3], dy, params.y.stride[3] * p.w.stride,
                    inputs.end - inputs.begin, channels);
        }
        for (int64_t i = 0; i < p.w.kernel * kN; ++i) total[i] += sums[i];
      }
    for (int64_t kw = 0; kw < p.w.kernel; ++kw)
      for (int64_t i = 0; i < channels; ++i)
        static_cast<S*>(params.w.data)[params.w.at(c + i, 0, kh, kw)] =
            convert<S>(total[kw * kN + i]);
  }

  static void add_lanes(T* sums, const S* x, int64_t x_step, const S* dy, int64_t dy_step,
                        int64_t count, int64_t channels) {
    if (channels == kN) {
      Vector<T> sum = load_vector(sums);
      for (int64_t pixel = 0; pixel < count; ++pixel, x += x_step, dy += dy_step)
        sum += load_as<T>(x) * load_as<T>(dy);
      store_vector(sums, sum);
      return;
    }
    for (int64_t pixel = 0; pixel < count; ++pixel, x += x_step, dy += dy_step)
      for (int64_t i = 0; i < channels; ++i) sums[i] += convert<T>(x[i]) * convert<T>(dy[i]);
  }
};

template <class S>
void depthwise(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const Problem& p = params.problem;
  if (op == Op::kGradWeight) {
    const Depthwise<S> kernel{params, params.problem, nullptr};
    parallel_for((p.c_in + kLanes<T> - 1) / kLanes<T> * p.h.kernel, threads, [&](int64_t task) {
      in_phase(Phase::kProduct,
               [&] { kernel.grad_weight_row(task / p.h.kernel * kLanes<T>, task % p.h.kernel); });
    });
    return;
  }
  const int64_t elements = p.h.kernel * p.w.kernel * p.c_in;
  T* packed = static_cast<T*>(call_scratch((elements + p.c_in) * sizeof(T)));
  T* start = packed + elements;
  for (int64_t c = 0; c < p.c_in; ++c)
    start[c] = op == Op::kForward && params.bias
                   ? convert<T>(static_cast<const S*>(params.bias)[c * params.bias_stride])
                   : T(0);
  const Depthwise<S> kernel{params, params.problem, packed};
  kernel.pack_weights();
  const int64_t rows = op == Op::kForward ? p.h.out : p.h.in;
  parallel_for(p.batch * rows, threads, [&](int64_t task) {
    in_phase(Phase::kProduct, [&] { kernel.row(op, task / rows, task % rows, start); });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
