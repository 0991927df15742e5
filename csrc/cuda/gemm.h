// "gemm": forward, grad_input and grad_weight as matrix products, on tensor cores where the type
// has them. Configurations are the names of the tiles in configs.h.
#pragma once

#include <string>
#include <vector>

#include "algorithms.h"
#include "gemm_plan.h"

namespace deconv {
namespace cuda {

std::vector<std::string> gemm_configs(Op op);
const char* gemm_declines(Op op, const Params& params, const std::string& config);
std::string run_gemm(Op op, const Params& params, const std::string& config,
                     const Context& context);

// The kernels of one type, a source file each.
struct GemmKernels {
  void (*gather)(const GatherPlan&, void* stream);
  // rows_of_run: rows that a thread owns next to each other, where it does (gemm_pack.cuh), or 0.
  void (*pack)(const GatherPlan&, int rows_of_run, void* stream);
  // Sums of each split into plan.partial, and those added.
  void (*weight)(const WeightPlan&, void* stream);
  void (*weight_reduce)(const WeightPlan&, void* stream);
};
extern const GemmKernels kGemmFloat16, kGemmBFloat16, kGemmTf32, kGemmFloat32, kGemmFloat64;

}  // namespace cuda
}  // namespace deconv
