// "direct": sums in registers, for layers that memory bounds (direct.cuh, direct_weight.cuh).
#pragma once

#include <string>
#include <vector>

#include "../deconv.h"

namespace deconv {
namespace cuda {
std::vector<std::string> direct_configs(Op op);
const char* direct_declines(Op op, const Params& params, const std::string& config);
std::string run_direct(Op op, const Params& params, const std::string& config,
                       const Context& context);
}  // namespace cuda
}  // namespace deconv
