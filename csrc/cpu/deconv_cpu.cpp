#include <stdexcept>

#include "../deconv.h"
#include "../reference/reference.h"

namespace deconv {
namespace cpu {
void run(Op op, const Params& params, const std::string& algorithm, int threads) {
  if (algorithm != "auto" && algorithm != "reference") throw std::invalid_argument("algo must be 'auto' or 'reference', but got '" + algorithm + "'");
  reference::run(op, params, threads);
}
std::vector<std::string> algorithms(Op) { return {"reference"}; }
std::vector<std::string> isas() { return {"portable"}; }
std::string isa() { return "portable"; }
void set_isa(const std::string&) {}
void grad_bias(const GradBiasParams& p, int) {
  for (int64_t c = 0; c < p.c_out; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < p.batch; ++n)
      for (int64_t h = 0; h < p.out_h; ++h)
        for (int64_t w = 0; w < p.out_w; ++w) sum += p.dtype == Dtype::kFloat32 ? static_cast<float*>(p.dy.data)[p.dy.at(n, c, h, w)] : static_cast<double*>(p.dy.data)[p.dy.at(n, c, h, w)];
    if (p.dtype == Dtype::kFloat32) static_cast<float*>(p.db)[c] = static_cast<float>(sum); else static_cast<double*>(p.db)[c] = sum;
  }
}
}  // namespace cpu
}  // namespace deconv
