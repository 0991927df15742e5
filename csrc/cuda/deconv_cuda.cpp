// The CUDA device's entry: which algorithm.
#include <stdexcept>

#include "../deconv.h"
#include "generic.h"

namespace deconv {
namespace cuda {

void run(Op op, const Params& params, const std::string& algorithm, const Context& context) {
  if (algorithm != "auto" && algorithm != "generic")
    throw std::invalid_argument("algo must be one of auto, generic on CUDA, but got '" + algorithm +
                                "'");
  generic(op, params, context.stream);
}

void grad_bias(const GradBiasParams& params, const Context& context) {
  generic_grad_bias(params, context.stream);
}

std::vector<std::string> algorithms(Op) { return {"generic"}; }

}  // namespace cuda
}  // namespace deconv
