// "direct": loops over rows, for depthwise and other problems with few channels a group, where a
// matrix product has nothing to reuse.
//
//     forward       y row  (n, co, oh) = bias + sum over ci, kh, kw of w * x row shifted       one
//     accumulator row a column phase grad_input    dx row (n, ci, ih) = sum over co, kh, kw of w *
//     dy row, every stride-th grad_weight   dw (ci, co, kh, kw) = sum over n, ih of the dot product
//     of those rows
//
// Taps are clipped to the image, so nothing is padded. Rows are handled in pieces: scratch does not
// grow with the image.
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "interleave.h"
#include "microkernel.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

constexpr int64_t kPiece =
    4096;  // elements of a row handled at a time: its accumulators stay in L1

// sum[i] += w * x[i * Stride]; Stride 0 stands for one known only at run time.
template <int Stride, class T, class S>
inline void add_scaled_row(T* sum, const S* x, int64_t stride, T w, int64_t count) {
  if constexpr (Stride > 0) {
    for (int64_t i = 0; i < count; i += kLanes<T>) {
      const int64_t left = count - i;
      const Vector<T> v = w * load_every<T, Stride>(x + i * Stride, (left - 1) * Stride + 1);
      if (left >= kLanes<T>) {
        store_vector(sum + i, load_vector(sum + i) + v);
      } else {
        store_first(sum + i, load_first<T>(sum + i, left) + v, left);
      }
    }
  } else {
    for (int64_t i = 0; i < count; ++i) sum[i] += w * convert<T>(x[i * stride]);
  }
}

template <class T, class S>
inline void add_scaled(T* sum, const S* x, int64_t stride, T w, int64_t count) {
  switch (stride) {
    case 1:
      return add_scaled_row<1>(sum, x, stride, w, count);
    case 2:
      return add_scaled_row<2>(sum, x, stride, w, count);
    case 4:
      return add_scaled_row<4>(sum, x, stride, w, count);
  }
  add_scaled_row<0>(sum, x, stride, w, count);
}

// sum[i mod kLanes] += x[i * x_stride] * y[i * y_stride]; Stride is that of y where x is
// contiguous, else 0.
template <int Stride, class T, class S>
inline void add_products_row(T* sum, const S* x, int64_t x_stride, const S* y, int64_t y_stride,
                             int64_t count) {
  if constexpr (Stride > 0) {
    Vector<T> total = load_vector(sum);
    for (int64_t i = 0; i < count; i += kLanes<T>)
      total += load_every<T, 1>(x + i, count - i) *
               load_every<T, Stride>(y + i * Stride, (count - i - 1) * Stride + 1);
    store_vector(sum, total);
  } else {
    for (int64_t i = 0; i < count; ++i)
      sum[i % kLanes<T>] += convert<T>(x[i * x_stride]) * convert<T>(y[i * y_stride]);
  }
}

template <class T, class S>
inline void add_products(T* sum, const S* x, int64_t x_stride, const S* y, int64_t y_stride,
                         int64_t count) {
  switch (x_stride == 1 ? y_stride : 0) {
    case 1:
      return add_products_row<1>(sum, x, x_stride, y, y_stride, count);
    case 2:
      return add_products_row<2>(sum, x, x_stride, y, y_stride, count);
    case 4:
      return add_products_row<4>(sum, x, x_stride, y, y_stride, count);
  }
  add_products_row<0>(sum, x, x_stride, y, y_stride, count);
}

// Sums of many terms in two levels, as everywhere (microkernel.h): call after every row of terms;
// folds the partial sums into the totals when they have taken kPartialSum terms.
template <class T>
struct PartialSums {
  T *partial, *total;
  int64_t count, terms = 0;

  PartialSums(T* memory, int64_t size) : partial(memory), total(memory + size), count(size) {
    for (int64_t i = 0; i < 2 * count; ++i) memory[i] = 0;
  }
  void added(int64_t more) {
    terms += more;
    if (terms >= kPartialSum) fold();
  }
  void fold() {
    for (int64_t i = 0; i < count; ++i) total[i] += partial[i];
    for (int64_t i = 0; i < count; ++i) partial[i] = 0;
    terms = 0;
  }
};

// Inputs i in [begin, end) that kernel element k carries to an output inside the axis.
inline Range inputs_of(const Axis& axis, int64_t k) {
  const int64_t shift = k * axis.dilation - axis.pad;
  const int64_t begin = shift >= 0 ? 0 : (-shift + axis.stride - 1) / axis.stride;
  const int64_t end =
      axis.out - 1 - shift < 0 ? 0 : min_of(axis.in, (axis.out - 1 - shift) / axis.stride + 1);
  return {begin, max_of(begin, end)};
}

// What a kernel column does to a row: inputs [begin, end) go to the outputs from `output` on, which
// are position begin - shift of phase `phase`.
struct ColumnTap {
  int64_t begin, end, output, phase, shift;
};

inline ColumnTap column_tap(const Axis& axis, int64_t k) {
  const Range inputs = inputs_of(axis, k);
  const int64_t output = inputs.begin * axis.stride + k * axis.dilation - axis.pad;
  if (inputs.begin == inputs.end) return {0, 0, 0, 0, 0};
  return {inputs.begin, inputs.end, output, output % axis.stride,
          inputs.begin - output / axis.stride};
}

template <class S>
struct Direct {
  using T = typename Arithmetic<S>::type;

  const Params& params;
  const ColumnTap* columns;  // [kernel_w]
  const Problem& p = params.problem;
  int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;

  const S* at(const TensorRef& t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) const {
    return static_cast<const S*>(t.data) + t.at(i0, i1, i2, i3);
  }
  T weight(int64_t ci, int64_t co, int64_t kh, int64_t kw) const {
    return convert<T>(*at(params.w, ci, co, kh, kw));
  }

  // One output row. Phase r of the row holds the outputs j * stride + r.
  void forward_row(int64_t n, int64_t co, int64_t oh) const {
    const int64_t phases = min_of(p.w.stride, p.w.out),
                  positions = (p.w.out + p.w.stride - 1) / p.w.stride;
    const int64_t piece = max_of<int64_t>(1, min_of(positions, kPiece / phases));
    const int64_t group = co / group_out;
    const T bias = params.bias
                       ? convert<T>(static_cast<const S*>(params.bias)[co * params.bias_stride])
                       : T(0);
    Carver carver(thread_scratch(2 * phases * piece * sizeof(T) + phases * sizeof(T*) + 64));
    T* memory = carver.take<T>(2 * phases * piece);
    const T** rows = carver.take<const T*>(phases);
    for (int64_t j0 = 0; j0 < positions; j0 += piece) {
      const int64_t count = min_of(piece, positions - j0);
      PartialSums<T> sums(memory, phases * piece);  // [phase][position]
      for (int64_t r = 0; r < phases; ++r) rows[r] = sums.total + r * piece;
      for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
        const int64_t ih = input_index(p.h, oh, kh);
        if (ih < 0) continue;
        for (int64_t ci = group * group_in; ci < (group + 1) * group_in; ++ci) {
          for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
            const ColumnTap& tap = columns[kw];
            const int64_t begin = max_of(tap.begin, j0 + tap.shift),
                          end = min_of(tap.end, j0 + count + tap.shift);
            if (begin < end)
              add_scaled(sums.partial + tap.phase * piece + begin - tap.shift - j0,
                         at(params.x, n, ci, ih, begin), params.x.stride[3],
                         weight(ci, co - group * group_out, kh, kw), end - begin);
          }
          sums.added(p.w.kernel / phases + 1);
        }
      }
      sums.fold();
      S* y = static_cast<S*>(params.y.data) + params.y.at(n, co, oh, 0);
      if (params.y.stride[3] == 1) {
        interleave(y, j0 * p.w.stride, p.w.stride, p.w.out, rows, phases, 0, count, bias);
      } else {
        for (int64_t r = 0; r < phases; ++r)
          for (int64_t j = 0; j < count && (j0 + j) * p.w.stride + r < p.w.out; ++j)
            y[((j0 + j) * p.w.stride + r) * params.y.stride[3]] = convert<S>(rows[r][j] + bias);
      }
    }
  }

  void grad_input_row(int64_t n, int64_t ci, int64_t ih) const {
    const int64_t group = ci / group_in, piece = min_of(kPiece, p.w.in);
    T* memory = static_cast<T*>(thread_scratch(2 * piece * sizeof(T)));
    for (int64_t i0 = 0; i0 < p.w.in; i0 += piece) {
      const int64_t count = min_of(piece, p.w.in - i0);
      PartialSums<T> sums(memory, count);
      for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
        const int64_t oh = output_index(p.h, ih, kh);
        if (oh < 0) continue;
        for (int64_t co = 0; co < group_out; ++co) {
          for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
            const ColumnTap& tap = columns[kw];
            const int64_t begin = max_of(tap.begin, i0), end = min_of(tap.end, i0 + count);
            if (begin < end)
              add_scaled(sums.partial + begin - i0,
                         at(params.y, n, group * group_out + co, oh,
                            tap.output + (begin - tap.begin) * p.w.stride),
                         params.y.stride[3] * p.w.stride, weight(ci, co, kh, kw), end - begin);
          }
          sums.added(p.w.kernel);
        }
      }
      sums.fold();
      S* dx = static_cast<S*>(params.x.data) + params.x.at(n, ci, ih, i0);
      for (int64_t i = 0; i < count; ++i) dx[i * params.x.stride[3]] = convert<S>(sums.total[i]);
    }
  }

  // The weights of one pair of channels and one kernel row. A column of lanes each, added over all
  // lines, then summed.
  void grad_weight_row(int64_t ci, int64_t co, int64_t kh) const {
    constexpr int kN = kLanes<T>;
    PartialSums<T> sums(static_cast<T*>(thread_scratch(2 * p.w.kernel * kN * sizeof(T))),
                        p.w.kernel * kN);
    const int64_t channel = ci / group_in * group_out + co;
    const Range lines = inputs_of(p.h, kh);
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t ih = lines.begin; ih < lines.end; ++ih) {
        const int64_t oh = output_index(p.h, ih, kh);
        for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
          const ColumnTap& tap = columns[kw];
          if (tap.begin < tap.end)
            add_products(sums.partial + kw * kN, at(params.x, n, ci, ih, tap.begin),
                         params.x.stride[3], at(params.y, n, channel, oh, tap.output),
                         params.y.stride[3] * p.w.stride, tap.end - tap.begin);
        }
        sums.added(p.w.in / kN + 1);
      }
    sums.fold();
    for (int64_t kw = 0; kw < p.w.kernel; ++kw) {
      T total = 0;
      for (int lane = 0; lane < kN; ++lane) total += sums.total[kw * kN + lane];
      static_cast<S*>(params.w.data)[params.w.at(ci, co, kh, kw)] = convert<S>(total);
    }
  }
};

template <class S>
void direct(Op op, const Params& params, int threads) {
  const Problem& p = params.problem;
  ColumnTap* columns = static_cast<ColumnTap*>(call_scratch(p.w.kernel * sizeof(ColumnTap)));
  for (int64_t kw = 0; kw < p.w.kernel; ++kw) columns[kw] = column_tap(p.w, kw);
  const Direct<S> kernel{params, columns};
  if (op == Op::kGradWeight) {
    const int64_t outputs = p.c_out / p.groups;
    parallel_for(p.c_in * outputs * p.h.kernel, threads, [&](int64_t task) {
      kernel.grad_weight_row(task / p.h.kernel / outputs, task / p.h.kernel % outputs,
                             task % p.h.kernel);
    });
    return;
  }
  // A task is some rows of one plane.
  constexpr int64_t kRows = 16;
  const int64_t planes = op == Op::kForward ? p.c_out : p.c_in,
                rows = op == Op::kForward ? p.h.out : p.h.in, parts = (rows + kRows - 1) / kRows;
  parallel_for(p.batch * planes * parts, threads, [&](int64_t task) {
    const int64_t n = task / parts / planes, plane = task / parts % planes,
                  first = task % parts * kRows;
    for (int64_t row = first; row < min_of(first + kRows, rows); ++row) {
      if (op == Op::kForward) {
        kernel.forward_row(n, plane, row);
      } else {
        kernel.grad_input_row(n, plane, row);
      }
    }
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
