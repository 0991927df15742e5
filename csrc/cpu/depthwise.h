// "depthwise": one channel a group and channels innermost in memory (channels_last): lanes are
// channels.
//
//     forward       y[n, oh, ow, :]  = activation(bias + sum of w[k, :] * x[n, ih, iw, :]),
//                                      over taps
//     grad_input    dx[n, ih, iw, :] = sum of w[k, :] * dy[n, oh, ow, :], over taps
//     grad_weight   dw[k, :]         = sum of x[n, ih, iw, :] * dy[n, oh, ow, :], over n, ih, iw
//
// The weight is transposed to [k][channel] once; taps are clipped to the image. Forward sums a
// pixel in registers, over all of its taps. grad_input has pieces of a row of sums in memory and
// goes over kernel rows, whose weights stay in registers. grad_weight goes over lines, sums a line
// in registers, four neighbouring taps at a time, and shares lines and channels out to tasks
// (direct_weight.h).
#pragma once

#include <algorithm>
#include <vector>

#include "activate.h"
#include "channel_lanes.h"
#include "direct_weight.h"
#include "output_pool.h"
#include "row_plan.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct DepthwiseForward {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  static constexpr int kVectors = 4;  // of sums held in registers

  // A tap along one axis: element offsets of what it reads.
  struct Term {
    int64_t source, weight;
  };
  struct Terms {
    const Term* list;
    int64_t count;
  };
  // The taps of each index of y along one axis that read inside.
  struct AxisTerms {
    std::vector<Term> list = {};      // one index after the other
    std::vector<size_t> first = {0};  // [indices + 1]

    AxisTerms(const Axis& axis, int64_t source_stride, int64_t weight_stride) {
      const AxisPlan plan = plan_axis(Op::kForward, axis);
      AxisPosition at(plan, 0);
      for (int64_t i = 0; i < axis.out; ++i, at.next()) {
        for (const PhaseTap& tap : at)
          if (const int64_t source = at.source(tap); source >= 0)
            list.push_back({source * source_stride, tap.k * weight_stride});
        first.push_back(list.size());
      }
    }
    Terms operator[](int64_t i) const {
      const size_t begin = first[static_cast<size_t>(i)], end = first[static_cast<size_t>(i) + 1];
      return {list.data() + begin, static_cast<int64_t>(end - begin)};
    }
  };

  const Params& params;
  const T* weights;  // [kernel_h][kernel_w][channels]
  const T* start;    // [channels] what a sum begins with: the bias or zeros
  bool streams;      // results are written past the caches
  const Problem& p = params.problem;
  const int64_t pitch = round_up<int64_t>(p.c_in, kN);  // of weights
  const AxisTerms terms_h{p.h, params.x.stride[2], p.w.kernel * pitch};
  const AxisTerms terms_w{p.w, params.x.stride[3], pitch};

  // The activation of finished sums, the bias among their terms.
  template <int Vectors>
  void activate(Vector<T> (&sums)[Vectors]) const {
    if (params.activation == Activation::kNone) return;
    T values[Vectors * kN];
    for (int v = 0; v < Vectors; ++v) store_vector(values + v * kN, sums[v]);
    activate_lines<T>(params, {values, 1, 0, Vectors * kN, nullptr, false});
    for (int v = 0; v < Vectors; ++v) sums[v] = load_vector(values + v * kN);
  }

  // to[i] = start[i] + sum over both axes' terms of weight * source, for Vectors of channels from
  // c on
  template <int Vectors>
  void sum_terms(Terms h, Terms w, const S* source, int64_t c, S* to) const {
    Vector<T> sums[Vectors], x[Vectors];
    for (int v = 0; v < Vectors; ++v) sums[v] = load_vector(start + c + v * kN);
    for (int64_t i = 0; i < h.count; ++i)
      for (int64_t j = 0; j < w.count; ++j) {
        load_channels<Vectors, T>(source + h.list[i].source + w.list[j].source + c, p.c_in - c, x);
        const T* weight = weights + h.list[i].weight + w.list[j].weight + c;
        for (int v = 0; v < Vectors; ++v) sums[v] += load_vector(weight + v * kN) * x[v];
      }
    activate(sums);
    store_channels<Vectors, T>(to + c, p.c_in - c, sums, streams);
  }

  // One row of y.
  void row(int64_t n, int64_t line) const {
    const Terms h = terms_h[line];
    const S* image = static_cast<const S*>(params.x.data) + params.x.at(n, 0, 0, 0);
    S* to = static_cast<S*>(params.y.data) + params.y.at(n, 0, line, 0);
    for (int64_t column = 0; column < p.w.out; ++column, to += params.y.stride[3]) {
      const Terms w = terms_w[column];
      for_channels<T, kVectors>(
          p.c_in, [&](auto vectors, int64_t c) { sum_terms<vectors>(h, w, image, c, to); });
    }
  }
};

// Rows of dx. A row is summed in pieces, kernel row by kernel row: each reads a line of dy in the
// order of memory, against weights in registers.
template <class S>
struct DepthwiseInput {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  static constexpr int kTaps = 5, kVectors = kVectorBytes == 64 ? 4 : 2;  // weights in registers
  static constexpr int64_t kSums = 16 << 10;                              // bytes of a piece
  static constexpr int64_t kPixels = 4;                                   // of a piece at least

  // Pixels [first, last) of a row read all of the taps [k, k + taps) inside.
  struct Run {
    int64_t first, last, k, taps;
  };
  // Pixels [first, last) of a row, which are those of the runs [first_run, last_run).
  struct Piece {
    int64_t first, last;
    size_t first_run, last_run;
  };

  const Params& params;
  const T* weights;  // [kernel_h][kernel_w][channels]
  bool streams;
  const Problem& p = params.problem;
  const int64_t pitch = round_up<int64_t>(p.c_in, kN);  // of weights, and a pixel's sums
  const int64_t x_step = params.x.stride[3], y_step = params.y.stride[3];
  std::vector<Run> runs = {};
  std::vector<Piece> pieces = {};

  DepthwiseInput(const Params& of, const T* packed, bool past_caches)
      : params(of), weights(packed), streams(past_caches) {
    const int64_t fitting = kSums / pitch / static_cast<int64_t>(sizeof(T)),
                  pixels = max_of(kPixels, fitting);
    for (int64_t first = 0; first < p.w.in; first += pixels) {
      const int64_t last = min_of(p.w.in, first + pixels);
      const size_t first_run = runs.size();
      for (int64_t i = first; i < last;) i = list_runs(i, last);
      pieces.push_back({first, last, first_run, runs.size()});
    }
  }

  // The taps of a pixel that read inside follow each other.
  Range taps_inside(int64_t pixel) const {
    int64_t begin = 0, end = p.w.kernel;
    while (begin < end && output_index(p.w, pixel, begin) < 0) ++begin;
    while (begin < end && output_index(p.w, pixel, end - 1) < 0) --end;
    return {begin, end};
  }

  // Lists the runs of the pixels from `first` on that have the same taps, and says where they end.
  int64_t list_runs(int64_t first, int64_t end) {
    const Range taps = taps_inside(first);
    const auto same = [&](Range other) {
      return other.begin == taps.begin && other.end == taps.end;
    };
    int64_t last = first + 1;
    while (last < end && same(taps_inside(last))) ++last;
    const int64_t count = taps.end - taps.begin, blocks = ceil_div(count, kTaps);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t k = count * i / blocks;
      runs.push_back({first, last, taps.begin + k, count * (i + 1) / blocks - k});
    }
    return last;
  }

  // Sums of a piece are [chunk of channels][pixel][channel]: with those of a pixel as far apart as
  // pixels of dy are, loads would wait for stores to addresses that look alike.
  static T* at(T* sums, const Piece& piece, int64_t pixel, int64_t c, int64_t width) {
    return sums + c * (piece.last - piece.first) + (pixel - piece.first) * width;
  }

  // sums[pixel][channel] += sum over taps of w[tap][channel] * dy[pixel * stride + tap][channel],
  // for Vectors of channels, or for `channels` fewer than a vector
  template <int Taps, int Vectors>
  void add_pixels(const T* weight, const S* dy, int64_t pixels, T* sums, int64_t channels) const {
    Vector<T> w[Taps][Vectors], sum[Vectors], factor[Vectors];
    for (int k = 0; k < Taps; ++k)
      for (int v = 0; v < Vectors; ++v) w[k][v] = load_vector(weight + k * pitch + v * kN);
    const int64_t next = p.w.stride * y_step, tap = p.w.dilation * y_step;
    for (int64_t i = 0; i < pixels; ++i, dy += next, sums += Vectors * kN) {
      for (int v = 0; v < Vectors; ++v) sum[v] = load_vector(sums + v * kN);
      for (int k = 0; k < Taps; ++k) {
        load_channels<Vectors, T>(dy + k * tap, channels, factor);
        for (int v = 0; v < Vectors; ++v) sum[v] += w[k][v] * factor[v];
      }
      for (int v = 0; v < Vectors; ++v) store_vector(sums + v * kN, sum[v]);
    }
  }

  template <int Taps>
  void add_run(const T* weight, const S* dy, const Run& run, const Piece& piece, T* sums) const {
    for_channels<T, kVectors>(p.c_in, [&](auto vectors, int64_t c) {
      add_pixels<Taps, vectors>(weight + c, dy + c, run.last - run.first,
                                at(sums, piece, run.first, c, vectors * kN), p.c_in - c);
    });
  }

  // A kernel row against a line of dy.
  void add_line(const T* weight, const S* line, const Piece& piece, T* sums) const {
    typedef void (DepthwiseInput::*AddRun)(const T*, const S*, const Run&, const Piece&, T*) const;
    static constexpr AddRun add[] = {&DepthwiseInput::add_run<1>, &DepthwiseInput::add_run<2>,
                                     &DepthwiseInput::add_run<3>, &DepthwiseInput::add_run<4>,
                                     &DepthwiseInput::add_run<5>};
    static_assert(sizeof(add) / sizeof(*add) == kTaps);
    for (size_t i = piece.first_run; i < piece.last_run; ++i) {
      const Run& run = runs[i];
      const S* dy = line + output_index(p.w, run.first, run.k) * y_step;
      (this->*add[run.taps - 1])(weight + run.k * pitch, dy, run, piece, sums);
    }
  }

  void store(const Piece& piece, T* sums, S* to) const {
    for (int64_t pixel = piece.first; pixel < piece.last; ++pixel, to += x_step)
      for_channels<T, kVectors>(p.c_in, [&](auto vectors, int64_t c) {
        const T* from = at(sums, piece, pixel, c, vectors * kN);
        Vector<T> values[vectors];
        for (int v = 0; v < vectors; ++v) values[v] = load_vector(from + v * kN);
        store_channels<vectors, T>(to + c, p.c_in - c, values, streams);
      });
  }

  void row(int64_t n, int64_t ih) const {
    for (const Piece& piece : pieces) {
      const int64_t size = (piece.last - piece.first) * pitch;
      T* sums = static_cast<T*>(thread_scratch(size * sizeof(T)));
      std::fill(sums, sums + size, T(0));
      for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
        const int64_t oh = output_index(p.h, ih, kh);
        if (oh < 0) continue;
        const S* line = static_cast<const S*>(params.y.data) + params.y.at(n, 0, oh, 0);
        add_line(weights + kh * p.w.kernel * pitch, line, piece, sums);
      }
      store(piece, sums, static_cast<S*>(params.x.data) + params.x.at(n, 0, ih, piece.first));
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
    Vector<T> factor[Vectors], gradient[Vectors];
    for (int64_t pixel = 0, at = 0; pixel < pixels; ++pixel, x += x_step, at += dy_step) {
      load_channels<Vectors, T>(x, channels, factor);
      for (int k = 0; k < Taps; ++k) {
        load_channels<Vectors, T>(from[k] + at, channels, gradient);
        for (int v = 0; v < Vectors; ++v) sum[k][v] += factor[v] * gradient[v];
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
    for_channels<T, 2>(channels, [&](auto vectors, int64_t c) {
      const S* at[Taps];
      for (int k = 0; k < Taps; ++k) at[k] = from[k] + c;
      add_pixels<Taps, vectors>(x + c, x_step, at, dy_step * p.w.stride, end - begin, sums + c,
                                pitch, channels - c);
    });
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
              sums.total[(kh - t.row_begin) * row_sums + kw * pitch +
                         lane_of_channel<S>(c, channels)];
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
  const bool forward = op == Op::kForward;
  const int64_t pitch = round_up<int64_t>(p.c_in, kLanes<T>), taps = p.h.kernel * p.w.kernel;
  T* weights = static_cast<T*>(call_scratch((taps + 1) * pitch * sizeof(T)));
  T* start = weights + taps * pitch;
  std::fill(weights, start + pitch, T(0));
  for (int64_t c = 0; c < p.c_in; ++c) {
    const int64_t lane = lane_of_channel<S>(c, p.c_in);
    for (int64_t kh = 0; kh < p.h.kernel; ++kh)
      for (int64_t kw = 0; kw < p.w.kernel; ++kw)
        weights[(kh * p.w.kernel + kw) * pitch + lane] =
            convert<T>(static_cast<const S*>(params.w.data)[params.w.at(c, 0, kh, kw)]);
    if (forward && params.bias)
      start[lane] = convert<T>(static_cast<const S*>(params.bias)[c * params.bias_stride]);
  }
  const bool streams = p.c_in % kLanes<T> == 0 &&
                       outgrows_caches(result_elements(op, p) * static_cast<int64_t>(sizeof(S)));
  const auto for_rows = [&](int64_t rows, const auto& row) {
    // Neighbouring rows read much of the same.
    const int64_t each = rows_of_a_task(rows, p.batch, threads), parts = ceil_div(rows, each);
    parallel_for(p.batch * parts, threads, [&](int64_t task) {
      in_phase(Phase::kProduct, [&] {
        const int64_t first = task % parts * each;
        for (int64_t i = first; i < min_of(first + each, rows); ++i) row(task / parts, i);
        if (streams) end_streams();
      });
    });
  };
  if (forward) {
    const DepthwiseForward<S> y(params, weights, start, streams);
    for_rows(p.h.out, [&](int64_t n, int64_t oh) { y.row(n, oh); });
  } else {
    const DepthwiseInput<S> dx(params, weights, streams);
    for_rows(p.h.in, [&](int64_t n, int64_t ih) { dx.row(n, ih); });
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
