// The host's side of the matrix kernels: plan, workspace, launches.
#include "gemm.h"

#include <cuda_runtime_api.h>

#include <stdexcept>

#include "launch.h"

namespace deconv {
namespace cuda {
namespace {

Device current_device() {
  int device = 0, multiprocessors = 0, shared = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return {multiprocessors, shared};
}

Product product_of(Dtype dtype, bool allow_tf32) {
  if (dtype == Dtype::kFloat64) return kMma64;
  if (dtype == Dtype::kFloat32) return allow_tf32 ? kTf32 : kFma32;
  return kMma16;
}

const GemmKernels& kernels_of(Dtype dtype, Product product) {
  if (product == kMma64) return kGemmFloat64;
  if (product == kTf32) return kGemmTf32;
  if (product == kFma32) return kGemmFloat32;
  return dtype == Dtype::kFloat16 ? kGemmFloat16 : kGemmBFloat16;
}

}  // namespace

std::vector<std::string> gemm_configs(Op op) {
  std::vector<std::string> names;
  if (op == Op::kGradWeight) {
    for (const auto& tile : kWeightTiles) names.emplace_back(tile.name);
  } else {
    for (const auto& tile : kGatherTiles) names.emplace_back(tile.name);
  }
  return names;
}

const char* gemm_declines(Op op, const Params& params, const std::string& config) {
  if (const char* declined = decline_gemm(op, params)) return declined;
  const Device device = current_device();
  // Whether TF32 is allowed is not known here: a tile that either product has is a tile.
  for (bool allow_tf32 : {false, true}) {
    const Product product = product_of(params.dtype, allow_tf32);
    try {
      if (op == Op::kGradWeight)
        plan_weight(params, product, config, device);
      else
        plan_gather(op, params, product, config, device);
      return nullptr;
    } catch (const std::invalid_argument&) {
    }
  }
  return "it has no such tile for this type, or shared memory does not hold it";
}

std::string run_gemm(Op op, const Params& params, const std::string& config,
                     const Context& context) {
  const Product product = product_of(params.dtype, context.allow_tf32);
  const GemmKernels& kernels = kernels_of(params.dtype, product);
  const Device device = current_device();
  const size_t sum_bytes = product == kMma64 ? sizeof(double) : sizeof(float);
  const std::string how = std::string(" (") + kProducts[product].name + ")";
  if (op == Op::kGradWeight) {
    WeightPlan plan = plan_weight(params, product, config, device);
    plan.partial =
        context.workspace(static_cast<size_t>(plan.splits * plan.partial_elements()) * sum_bytes);
    kernels.weight(plan, context.stream);
    kernels.weight_reduce(plan, context.stream);
    return kWeightTiles[plan.tile].name + how;
  }
  GatherPlan plan = plan_gather(op, params, product, config, device);
  plan.packed = context.workspace(static_cast<size_t>(plan.packed_vectors()) * kVectorBytes);
  const GatherTile& tile = kGatherTiles[plan.tile];
  kernels.pack(plan, tile.rows_across ? tile.warp_rows / 4 : 0, context.stream);
  if (plan.splits > 1) {
    const int64_t sums = plan.blocks * tile.threads() * tile.accumulators();
    plan.partial = context.workspace(static_cast<size_t>(plan.splits * sums) * sum_bytes);
    kernels.gather(plan, context.stream);
    plan.combining = true;
  }
  kernels.gather(plan, context.stream);
  return tile.name + how;
}

}  // namespace cuda
}  // namespace deconv
