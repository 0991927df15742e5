// "wgmma": forward, grad_input and grad_weight of 16-bit types as products of warpgroups, on
// devices of compute capability 9.0. Configurations are the names of the tiles in configs.h.
#pragma once

#include <string>
#include <vector>

#include "algorithms.h"
#include "wgmma_plan.h"

namespace deconv {
namespace cuda {

std::vector<std::string> wgmma_configs(Op op);
const char* wgmma_declines(Op op, const Params& params, const std::string& config);
std::string run_wgmma(Op op, const Params& params, const std::string& config,
                      const Context& context);

// The kernels of one type, a source file each.
struct WgmmaKernels {
  void (*gather)(const WgmmaPlan&, void* stream);
  void (*weight)(const WgmmaWeightPlan&, void* stream);
  bool (*compiled)();  // for sm_90a, not just for sm_90
};
extern const WgmmaKernels kWgmmaFloat16, kWgmmaBFloat16;

}  // namespace cuda
}  // namespace deconv
