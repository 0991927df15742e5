#include "reference.h"

#include <stdexcept>

#include "../parallel.h"
#include "elements.h"

namespace deconv {
namespace reference {
namespace {

// Writes out[i0, i1, i2, i3] = element(i0, i1, i2, i3) for every index below `sizes`; one task a
// plane.
template <class T, class Element>
void fill(const TensorRef& out, const int64_t (&sizes)[4], int threads, const Element& element) {
  if (sizes[0] == 0 || sizes[1] == 0) return;
  parallel_for(sizes[0] * sizes[1], threads, [&](int64_t plane) {
    const int64_t i0 = plane / sizes[1], i1 = plane % sizes[1];
    for (int64_t i2 = 0; i2 < sizes[2]; ++i2)
      for (int64_t i3 = 0; i3 < sizes[3]; ++i3)
        static_cast<T*>(out.data)[out.at(i0, i1, i2, i3)] = convert<T>(element(i0, i1, i2, i3));
  });
}

template <class Sum, class T>
void run_typed(Op op, const Params& p, int threads) {
  const Problem& q = p.problem;
  switch (op) {
    case Op::kForward:
      return fill<T>(p.y, {q.batch, q.c_out, q.h.out, q.w.out}, threads,
                     [&](auto n, auto co, auto oh, auto ow) {
                       return forward_element<Sum, T>(p, n, co, oh, ow);
                     });
    case Op::kGradInput:
      return fill<T>(p.x, {q.batch, q.c_in, q.h.in, q.w.in}, threads,
                     [&](auto n, auto ci, auto ih, auto iw) {
                       return grad_input_element<Sum, T>(p, n, ci, ih, iw);
                     });
    case Op::kGradWeight:
      return fill<T>(p.w, {q.c_in, q.c_out / q.groups, q.h.kernel, q.w.kernel}, threads,
                     [&](auto ci, auto co, auto kh, auto kw) {
                       return grad_weight_element<Sum, T>(p, ci, co, kh, kw);
                     });
  }
}

}  // namespace

void run(Op op, const Params& p, int threads) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return run_typed<double, float>(op, p, threads);
    case Dtype::kFloat64:
      return run_typed<double, double>(op, p, threads);
    case Dtype::kFloat16:
      return run_typed<double, Float16>(op, p, threads);
    case Dtype::kBFloat16:
      return run_typed<double, BFloat16>(op, p, threads);
    case Dtype::kInt64:
      return run_typed<uint64_t, int64_t>(op, p, threads);
  }
}

void grad_bias(const GradBiasParams& p) {
  for (int64_t c = 0; c < p.c_out; ++c) {
    uint64_t sum = 0;
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t h = 0; h < p.out_h; ++h)
        for (int64_t w = 0; w < p.out_w; ++w)
          sum += load<uint64_t, int64_t>(p.dy, p.dy.at(n, c, h, w));
    static_cast<int64_t*>(p.db)[c] = static_cast<int64_t>(sum);
  }
}

}  // namespace reference
}  // namespace deconv
