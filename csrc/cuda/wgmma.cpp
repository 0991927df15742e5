// The host's side of the wgmma kernels: plan, workspace, launches.
#include "wgmma.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "gemm.h"
#include "launch.h"

namespace deconv {
namespace cuda {
namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

Device current_device() {
  return {attribute(cudaDevAttrMultiProcessorCount),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)};
}

const WgmmaKernels& kernels_of(Dtype dtype) {
  return dtype == Dtype::kFloat16 ? kWgmmaFloat16 : kWgmmaBFloat16;
}

}  // namespace

std::vector<std::string> wgmma_configs(Op op) {
  std::vector<std::string> names;
  if (op == Op::kGradWeight) {
    for (const WgmmaWeightTile& tile : kWgmmaWeightTiles) names.emplace_back(tile.name);
  } else {
    for (const WgmmaTile& tile : kWgmmaTiles) names.emplace_back(tile.name);
  }
  return names;
}

const char* wgmma_declines(Op op, const Params& params, const std::string& config) {
  if (const char* declined = decline_wgmma(op, params, attribute(cudaDevAttrComputeCapabilityMajor),
                                           attribute(cudaDevAttrComputeCapabilityMinor)))
    return declined;
  if (!kernels_of(params.dtype).compiled()) return "it was not compiled for sm_90a";
  try {
    if (op == Op::kGradWeight)
      plan_wgmma_weight(params, config, current_device());
    else
      plan_wgmma(op, params, config, current_device());
    return nullptr;
  } catch (const std::invalid_argument&) {
    return "it has no such tile, or shared memory does not hold it";
  }
}

std::string run_wgmma(Op op, const Params& params, const std::string& config,
                      const Context& context) {
  const GemmKernels& gemm = params.dtype == Dtype::kFloat16 ? kGemmFloat16 : kGemmBFloat16;
  if (op == Op::kGradWeight) {
    WgmmaWeightPlan plan = plan_wgmma_weight(params, config, current_device());
    plan.partial = context.workspace(static_cast<size_t>(plan.splits * plan.partial_elements()) *
                                     sizeof(float));
    kernels_of(params.dtype).weight(plan, context.stream);
    gemm.weight_reduce(plan, context.stream);
    return kWgmmaWeightTiles[plan.tile].name;
  }
  WgmmaPlan plan = plan_wgmma(op, params, config, current_device());
  plan.packed = context.workspace(static_cast<size_t>(plan.packed_vectors()) * kVectorBytes);
  const WgmmaTile& tile = kWgmmaTiles[plan.tile];
  gemm.pack(plan, tile.rows_across ? kWgmmaRun : 0, context.stream);
  kernels_of(params.dtype).gather(plan, context.stream);
  return tile.name;
}

}  // namespace cuda
}  // namespace deconv
