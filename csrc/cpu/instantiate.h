// Included last by each isa_*.cpp: the kernels for every float type, as a table.
#pragma once

#include "depthwise.h"
#include "direct.h"
#include "direct_weight.h"
#include "gather_gemm.h"
#include "grad_bias.h"
#include "kernels.h"
#include "weight_gemm.h"
#include "winograd.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Calls f with a value of the storage type.
template <class F>
void with_storage(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kFloat16:
      return f(Float16{});
    case Dtype::kBFloat16:
      return f(BFloat16{});
    case Dtype::kInt64:
      return;  // never gets here: integers belong to the reference
  }
}

inline Kernels table(const char* isa, bool (*supported)()) {
  return {
      isa,
      supported,
      nullptr,
      kLanes<float>,
      [](Op op, const Params& params, int threads) {
        with_storage(params.dtype, [&](auto s) { gather_gemm<decltype(s)>(op, params, threads); });
      },
      [](Op op, const Params& params, int threads) {
        with_storage(params.dtype, [&](auto s) { winograd<decltype(s)>(op, params, threads); });
      },
      [](Op op, const Params& params) {
        bool prefers = false;
        with_storage(params.dtype,
                     [&](auto s) { prefers = prefers_winograd<decltype(s)>(op, params); });
        return prefers;
      },
      [](const Params& params, int threads) {
        with_storage(params.dtype, [&](auto s) { weight_gemm<decltype(s)>(params, threads); });
      },
      [](Op op, const Params& params, int threads) {
        with_storage(params.dtype, [&](auto s) {
          op == Op::kGradWeight ? direct_weight<decltype(s)>(params, threads)
                                : direct<decltype(s)>(op, params, threads);
        });
      },
      [](Op op, const Params& params, int threads) {
        with_storage(params.dtype, [&](auto s) { depthwise<decltype(s)>(op, params, threads); });
      },
      [](const GradBiasParams& params, int threads) {
        with_storage(params.dtype, [&](auto s) { grad_bias<decltype(s)>(params, threads); });
      }};
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
