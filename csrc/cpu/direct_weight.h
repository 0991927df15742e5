// "direct" for grad_weight:
//
//     dw[ci, co, kh, kw] = sum over n, ih of the dot product of an x row and every stride-th
//     element of a dy row
//
// Taps are clipped to the image, so nothing is padded.
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "microkernel.h"
#include "profile.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

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
struct DirectWeight {
  using T = typename Arithmetic<S>::type;

  const Params& params;
  const ColumnTap* columns;  // [kernel_w]
  const Problem& p = params.problem;
  int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;

  const S* at(const TensorRef& t, int64_t i0, int64_t i1, int64_t i2, int64_t i3) const {
    return static_cast<const S*>(t.data) + t.at(i0, i1, i2, i3);
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
void direct_weight(const Params& params, int threads) {
  const Problem& p = params.problem;
  ColumnTap* columns = static_cast<ColumnTap*>(call_scratch(p.w.kernel * sizeof(ColumnTap)));
  for (int64_t kw = 0; kw < p.w.kernel; ++kw) columns[kw] = column_tap(p.w, kw);
  const DirectWeight<S> kernel{params, columns};
  const int64_t outputs = p.c_out / p.groups;
  parallel_for(p.c_in * outputs * p.h.kernel, threads, [&](int64_t task) {
    in_phase(Phase::kProduct, [&] {
      kernel.grad_weight_row(task / p.h.kernel / outputs, task / p.h.kernel % outputs,
                             task % p.h.kernel);
    });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
