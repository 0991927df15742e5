// "depthwise": one channel a group and channels innermost in memory (channels_last): lanes are
// channels.
//
//     forward       y[n, oh, ow, :]  = activation(bias + sum of w[k, :] * x[n, ih, iw, :]),
//                                      over taps
//     grad_input    dx[n, ih, iw, :] = sum of w[k, :] * dy[n, oh, ow, :], over taps
//     grad_weight   dw[k, :]         = sum of x[n, ih, iw, :] * dy[n, oh, ow, :], over n, ih, iw
//
// The weight is transposed to [k][channel] once; taps are clipped to the image. grad_weight goes
// over lines, sums a line in registers, four neighbouring taps at a time, and shares lines and
// channels out to tasks (direct_weight.h).
#pragma once

#include "activate.h"
#include "direct_weight.h"
#include "output_pool.h"
#include "row_plan.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct Depthwise {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  static constexpr int kVectors = 4;  // of sums held in registers

  const Params& params;
  const AxisPlan &axis_h, &axis_w;
  T* weights;    // [kernel_h][kernel_w][channels]
  bool streams;  // results are written past the caches
  const Problem& p = params.problem;

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

  // The lines of grad_input's next column, for Vectors of channels from c on. A pixel is read in
  // pieces that are too short for the processor to see what comes.
  template <int Vectors>
  void fetch_next(Terms h, Terms w, const S* source, int64_t c) const {
    constexpr int kLine = 64 / sizeof(S);
    if (w.count == 0) return;
    const S* last = source + w.list[w.count - 1].source + c;
    for (int64_t i = 0; i < h.count; ++i)
      for (int64_t pixel = 1; pixel <= p.w.stride; ++pixel)
        for (int at = 0; at < Vectors * kN; at += kLine)
          prefetch(last + h.list[i].source + pixel * params.y.stride[3] + at);
  }

  // to[i] = start[i] + sum over both axes' terms of weight * source, for Vectors of channels from c
  // on, or for `channels` fewer than a vector
  template <int Vectors>
  void sum_terms(Terms h, Terms w, const S* source, int64_t c, const T* start, S* to,
                 int64_t channels = kN) const {
    const auto load = [&](const auto* from, int v) DECONV_INLINED {
      return Vectors > 1 || channels == kN ? load_as<T>(from + v * kN)
                                           : load_first<T>(from, channels);
    };
    Vector<T> sums[Vectors];
    for (int v = 0; v < Vectors; ++v) sums[v] = load(start + c, v);
    for (int64_t i = 0; i < h.count; ++i)
      for (int64_t j = 0; j < w.count; ++j) {
        const S* x = source + h.list[i].source + w.list[j].source + c;
        const T* weight = weights + h.list[i].weight + w.list[j].weight + c;
        for (int v = 0; v < Vectors; ++v) sums[v] += load(weight, v) * load(x, v);
      }
    activate(sums);
    for (int v = 0; v < Vectors; ++v) {
      S* here = to + c + v * kN;
      if (Vectors == 1 && channels < kN) {
        store_first_as(here, sums[v], channels);
      } else if (streams && streamable<T>(here)) {
        stream_as(here, sums[v]);
      } else {
        store_as(here, sums[v]);
      }
    }
  }

  // The taps of one index of the target that read inside.
  static Terms find_terms(const AxisPosition& at, int64_t source_stride, int64_t weight_stride,
                          Term* list) {
    int64_t count = 0;
    for (const PhaseTap& tap : at) {
      const int64_t source = at.source(tap);
      if (source >= 0) list[count++] = {source * source_stride, tap.k * weight_stride};
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
    const Terms h =
        find_terms(AxisPosition(axis_h, line), source.stride[2], p.w.kernel * p.c_in, list_h);
    const S* image = static_cast<const S*>(source.data) + source.at(n, 0, 0, 0);
    AxisPosition at(axis_w, 0);
    for (int64_t column = 0; column < axis_w.target_size; ++column, at.next()) {
      const Terms w = find_terms(at, source.stride[3], p.c_in, list_w);
      S* to = static_cast<S*>(target.data) + target.at(n, 0, line, column);
      int64_t c = 0;
      for (; c + kVectors * kN <= p.c_in; c += kVectors * kN) {
        if (!forward) fetch_next<kVectors>(h, w, image, c);
        sum_terms<kVectors>(h, w, image, c, start, to);
      }
      for (; c < p.c_in; c += kN)
        sum_terms<1>(h, w, image, c, start, to, min_of<int64_t>(kN, p.c_in - c));
    }
  }
};

// grad_weight of a task: some lines, kernel rows and channels.
template <class S>
struct DepthwiseWeight {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  static constexpr int kTaps = 4;           // with their sums in registers
  static constexpr int64_t kChannels = 64;  // of a task

  const Params& params;
  const ColumnTap* columns;  // [kernel_w]
  const WeightTasks& tasks;
  T* partial;  // [part][channel][kernel_h][kernel_w]
  const Problem& p = params.problem;

  // sums[tap][channel] += sum over pixels of x[pixel][channel] * dy[tap][pixel][channel], for
  // Vectors of channels, or for `channels` fewer than a vector
  template <int Taps, int Vectors>
  static void add_pixels(const S* x, int64_t x_step, const S* const* dy, int64_t dy_step,
                         int64_t pixels, T* sums, int64_t pitch, int64_t channels) {
    Vector<T> sum[Taps][Vectors];
    const S* from[Taps];
    for (int k = 0; k < Taps; ++k) {
      from[k] = dy[k];
      for (int v = 0; v < Vectors; ++v) sum[k][v] = load_vector(sums + k * pitch + v * kN);
    }
    if (Vectors > 1 || channels == kN) {
      for (int64_t pixel = 0, at = 0; pixel < pixels; ++pixel, x += x_step, at += dy_step)
        for (int v = 0; v < Vectors; ++v) {
          const Vector<T> factor = load_as<T>(x + v * kN);
          for (int k = 0; k < Taps; ++k) sum[k][v] += factor * load_as<T>(from[k] + at + v * kN);
        }
    } else {
      for (int64_t pixel = 0, at = 0; pixel < pixels; ++pixel, x += x_step, at += dy_step) {
        const Vector<T> factor = load_first<T>(x, channels);
        for (int k = 0; k < Taps; ++k) sum[k][0] += factor * load_first<T>(from[k] + at, channels);
      }
    }
    for (int k = 0; k < Taps; ++k)
      for (int v = 0; v < Vectors; ++v) store_vector(sums + k * pitch + v * kN, sum[k][v]);
  }

  // Taps [k0, k0 + Taps) of a kernel row over the inputs [begin, end) of a line.
  template <int Taps>
  void add_taps(const S* x, const S* dy, int64_t k0, int64_t begin, int64_t end, T* sums,
                int64_t pitch, int64_t channels) const {
    if (begin >= end) return;
    const int64_t x_step = params.x.stride[3], dy_step = params.y.stride[3];
    const S* from[Taps];
    for (int k = 0; k < Taps; ++k)
      from[k] =
          dy + (columns[k0 + k].output + (begin - columns[k0 + k].begin) * p.w.stride) * dy_step;
    x += begin * x_step;
    int64_t c = 0;
    const auto advance = [&](int64_t by) {
      c += by;
      x += by;
      for (int k = 0; k < Taps; ++k) from[k] += by;
    };
    for (; c + 2 * kN <= channels; advance(2 * kN))
      add_pixels<Taps, 2>(x, x_step, from, dy_step * p.w.stride, end - begin, sums + c, pitch, kN);
    for (; c < channels; advance(kN))
      add_pixels<Taps, 1>(x, x_step, from, dy_step * p.w.stride, end - begin, sums + c, pitch,
                          min_of<int64_t>(kN, channels - c));
  }

  // One line of x against one of dy: inputs that all taps of a block carry inside, then each tap's
  // own.
  void add_line(const S* x, const S* dy, T* sums, int64_t pitch, int64_t channels) const {
    for (int64_t k0 = 0; k0 < p.w.kernel; k0 += kTaps) {
      const int64_t taps = min_of<int64_t>(kTaps, p.w.kernel - k0);
      int64_t begin = 0, end = p.w.in;
      for (int64_t k = k0; k < k0 + taps; ++k) {
        begin = max_of(begin, columns[k].begin);
        end = min_of(end, columns[k].end);
      }
      if (taps == kTaps) add_taps<kTaps>(x, dy, k0, begin, end, sums + k0 * pitch, pitch, channels);
      if (taps < kTaps || begin >= end) end = begin;
      for (int64_t k = k0; k < k0 + taps; ++k) {
        T* to = sums + k * pitch;
        add_taps<1>(x, dy, k, columns[k].begin, min_of(begin, columns[k].end), to, pitch, channels);
        add_taps<1>(x, dy, k, max_of(end, columns[k].begin), columns[k].end, to, pitch, channels);
      }
    }
  }

  void run(int64_t task) const {
    const WeightTasks::Task t = tasks.at(task);
    const int64_t c0 = t.unit * kChannels, channels = min_of(kChannels, p.c_in - c0),
                  pitch = round_up<int64_t>(channels, 2 * kN), row_sums = p.w.kernel * pitch,
                  rows = t.row_end - t.row_begin;
    PartialSums<T> sums(static_cast<T*>(thread_scratch(2 * rows * row_sums * sizeof(T))),
                        rows * row_sums);
    for (int64_t line = t.line_begin; line < t.line_end; ++line) {
      const int64_t n = line / p.h.in, ih = line % p.h.in;
      const S* x = static_cast<const S*>(params.x.data) + params.x.at(n, c0, ih, 0);
      for (int64_t kh = t.row_begin; kh < t.row_end; ++kh) {
        const int64_t oh = output_index(p.h, ih, kh);
        if (oh < 0) continue;
        const S* dy = static_cast<const S*>(params.y.data) + params.y.at(n, c0, oh, 0);
        add_line(x, dy, sums.partial + (kh - t.row_begin) * row_sums, pitch, channels);
      }
      sums.added(p.w.in);
    }
    sums.fold();
    T* to = partial + t.part * tasks.elements;
    for (int64_t kh = t.row_begin; kh < t.row_end; ++kh)
      for (int64_t kw = 0; kw < p.w.kernel; ++kw)
        for (int64_t c = 0; c < channels; ++c)
          to[((c0 + c) * p.h.kernel + kh) * p.w.kernel + kw] =
              sums.total[(kh - t.row_begin) * row_sums + kw * pitch + c];
  }
};

template <class S>
void depthwise_weight(const Params& params, int threads) {
  using Kernel = DepthwiseWeight<S>;
  const Problem& p = params.problem;
  const WeightTasks tasks(p, (p.c_in + Kernel::kChannels - 1) / Kernel::kChannels,
                          p.w.kernel * min_of(Kernel::kChannels, p.c_in), p.h.kernel);
  Carver carver(call_scratch(tasks.bytes(sizeof(typename Kernel::T)) +
                             round_up<int64_t>(p.w.kernel * sizeof(ColumnTap), 64)));
  ColumnTap* columns = carver.take<ColumnTap>(p.w.kernel);
  for (int64_t kw = 0; kw < p.w.kernel; ++kw) columns[kw] = column_tap(p.w, kw);
  const Kernel kernel{params, columns, tasks,
                      carver.take<typename Kernel::T>(tasks.parts * tasks.elements)};
  parallel_for(tasks.count(), threads,
               [&](int64_t task) { in_phase(Phase::kProduct, [&] { kernel.run(task); }); });
  finish_weights<S>(params, tasks, kernel.partial, threads);
}

template <class S>
void depthwise(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const Problem& p = params.problem;
  if (op == Op::kGradWeight) return depthwise_weight<S>(params, threads);
  const int64_t elements = p.h.kernel * p.w.kernel * p.c_in;
  T* packed = static_cast<T*>(call_scratch((elements + p.c_in) * sizeof(T)));
  T* start = packed + elements;
  for (int64_t c = 0; c < p.c_in; ++c)
    start[c] = op == Op::kForward && params.bias
                   ? convert<T>(static_cast<const S*>(params.bias)[c * params.bias_stride])
                   : T(0);
  const AxisPlan axis_h = plan_axis(op, p.h), axis_w = plan_axis(op, p.w);
  const bool streams = p.c_in % kLanes<T> == 0 &&
                       outgrows_caches(result_elements(op, p) * static_cast<int64_t>(sizeof(S)));
  const Depthwise<S> kernel{params, axis_h, axis_w, packed, streams};
  kernel.pack_weights();
  // Neighbouring rows read much of the same.
  const int64_t rows = axis_h.target_size, each = rows_of_a_task(rows, p.batch, threads),
                parts = ceil_div(rows, each);
  parallel_for(p.batch * parts, threads, [&](int64_t task) {
    in_phase(Phase::kProduct, [&] {
      const int64_t first = task % parts * each;
      for (int64_t row = first; row < min_of(first + each, rows); ++row)
        kernel.row(op, task / parts, row, start);
      if (streams) end_streams();
    });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
