// In the place of the operations: the kernel that `algorithm` names.
#include "planted.h"

#include <stdexcept>

#include "../../../csrc/deconv.h"

namespace deconv {
namespace cuda {

void run(Op, const Params& params, const std::string& algorithm, const Context&) {
  for (const auto* kernels :
       {&planted::kMistakes, &planted::kFragments, &planted::kTraffic, &planted::kAsynchronous}) {
    const auto found = kernels->find(algorithm);
    if (found != kernels->end()) return found->second(params);
  }
  throw std::invalid_argument("there is no kernel " + algorithm);
}

void grad_bias(const GradBiasParams&, const Context&) {}

std::vector<std::string> algorithms(Op) {
  std::vector<std::string> names;
  for (const auto& entry : planted::kMistakes) names.push_back(entry.first);
  return names;
}

}  // namespace cuda
}  // namespace deconv
