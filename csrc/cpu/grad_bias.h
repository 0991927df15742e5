// db[c] = sum of dy[n, c, h, w] over n, h, w. Lines are summed in vectors, the sums of lines in
// float64 and in a fixed order.
#pragma once

#include "../parallel.h"
#include "interleave.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct BiasSum {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;
  const GradBiasParams& p;

  // total[i] += sum over the line of channel c + i, for `channels` <= kN channels
  void add_line(int64_t c, int64_t channels, int64_t line, double* total) const {
    const S* dy = static_cast<const S*>(p.dy.data) + p.dy.at(line / p.out_h, c, line % p.out_h, 0);
    const int64_t channel = p.dy.stride[1], pixel = p.dy.stride[3];
    T sum[kN] = {};
    if (channel == 1) {
      for (int64_t w = 0; w < p.out_w; ++w)
        for (int64_t i = 0; i < channels; ++i) sum[i] += convert<T>(dy[w * pixel + i]);
      for (int64_t i = 0; i < channels; ++i) total[i] += static_cast<double>(sum[i]);
      return;
    }
    for (int64_t i = 0; i < channels; ++i, dy += channel) {
      int64_t w = 0;
      for (int lane = 0; lane < kN; ++lane) sum[lane] = 0;
      for (; w + kN <= p.out_w; w += kN)
        for (int lane = 0; lane < kN; ++lane) sum[lane] += convert<T>(dy[(w + lane) * pixel]);
      for (; w < p.out_w; ++w) sum[0] += convert<T>(dy[w * pixel]);
      for (int lane = 0; lane < kN; ++lane) total[i] += static_cast<double>(sum[lane]);
    }
  }
};

template <class S>
void grad_bias(const GradBiasParams& p, int threads) {
  using T = typename Arithmetic<S>::type;
  constexpr int64_t kTasks = 16, kN = kLanes<T>;
  const BiasSum<S> kernel{p};
  const int64_t lines = p.batch * p.out_h, parts = (p.c_out + kN - 1) / kN;
  const int64_t splits = min_of(lines, (kTasks + parts - 1) / parts);
  double* totals = static_cast<double*>(
      call_scratch(parts * splits * kN * sizeof(double)));  // [part][split][channel]
  parallel_for(parts * splits, threads, [&](int64_t task) {
    double* total = totals + task * kN;
    for (int64_t i = 0; i < kN; ++i) total[i] = 0;
    const int64_t c = task / splits * kN, split = task % splits;
    for (int64_t line = lines * split / splits; line < lines * (split + 1) / splits; ++line)
      kernel.add_line(c, min_of(kN, p.c_out - c), line, total);
  });
  for (int64_t c = 0; c < p.c_out; ++c) {
    double total = 0;
    for (int64_t split = 0; split < splits; ++split)
      total += totals[(c / kN * splits + split) * kN + c % kN];
    static_cast<S*>(p.db)[c] = convert<S>(total);
  }
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
