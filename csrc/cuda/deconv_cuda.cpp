// The CUDA device's entry: which algorithm.
#include <cstdio>
#include <stdexcept>

#include "../log.h"
#include "algorithms.h"
#include "direct.h"
#include "gemm.h"
#include "generic.h"
#include "reduce.h"
#include "wgmma.h"

namespace deconv {
namespace cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------------------------
// Algorithms

// Up to this many channels on one side of a group, and from this stride on, a matrix product would
// be mostly padding.
constexpr int64_t kFewChannels = 4;
constexpr int64_t kLargeStride = 8;
// grad_weight reads its operands again for each pair of channels of a group.
constexpr int64_t kFewPairs = 8;

bool prefer_direct(Op op, const Params& p) {
  const Problem& q = p.problem;
  if (op == Op::kGradWeight) return (q.c_in / q.groups) * (q.c_out / q.groups) <= kFewPairs;
  return std::min(q.c_in, q.c_out) / q.groups <= kFewChannels ||
         std::min(q.h.stride, q.w.stride) >= kLargeStride;
}

const char* generic_declines(Op, const Params&, const std::string& config) {
  return config.empty() ? nullptr : "it has no configurations";
}

std::vector<std::string> generic_configs(Op) { return {}; }

bool never(Op, const Params&) { return false; }

bool always(Op, const Params&) { return true; }

std::string run_generic(Op op, const Params& p, const std::string&, const Context& context) {
  generic(op, p, context.stream);
  return "";
}

// Best first. "auto" takes the first that accepts the problem and is preferred for it, else the
// first that accepts it.
const Algorithm kAlgorithms[] = {
    {"direct", direct_declines, prefer_direct, run_direct, direct_configs},
    {"wgmma", wgmma_declines, prefer_wgmma, run_wgmma, wgmma_configs},
    {"gemm", gemm_declines, always, run_gemm, gemm_configs},
    {"generic", generic_declines, never, run_generic, generic_configs},
};

std::invalid_argument declined_by(const std::string& algorithm, const char* why) {
  return std::invalid_argument("algo='" + algorithm + "' cannot take this problem: " + why);
}

const Algorithm& find(Op op, const Params& params, const std::string& name,
                      const std::string& config) {
  const Algorithm* accepts = nullptr;
  std::string names = "auto";
  for (const Algorithm& algorithm : kAlgorithms) {
    names += std::string(", ") + algorithm.name;
    if (name != "auto" && name != algorithm.name) continue;
    const char* declined = algorithm.declines(op, params, config);
    if (declined && name == "auto") continue;
    if (declined) throw declined_by(name + (config.empty() ? "" : ":" + config), declined);
    if (name == algorithm.name || algorithm.preferred(op, params)) return algorithm;
    if (!accepts) accepts = &algorithm;
  }
  if (!accepts)
    throw std::invalid_argument("algo must be one of " + names + ", but got '" + name + "'");
  return *accepts;
}

bool is_empty(Op op, const Problem& q) {
  if (op == Op::kGradWeight) return q.c_in * (q.c_out / q.groups) * q.h.kernel * q.w.kernel == 0;
  return op == Op::kForward ? q.batch * q.c_out * q.h.out * q.w.out == 0
                            : q.batch * q.c_in * q.h.in * q.w.in == 0;
}

}  // namespace

// `algorithm` is "auto", a name of the list, or "name:configuration".
void run(Op op, const Params& params, const std::string& algorithm, const Context& context) {
  const size_t colon = algorithm.find(':');
  const std::string config = colon == std::string::npos ? "" : algorithm.substr(colon + 1);
  if (is_empty(op, params.problem)) return;
  const Algorithm& chosen = find(op, params, algorithm.substr(0, colon), config);
  std::string used;
  try {
    used = chosen.run(op, params, config, context);
  } catch (const std::invalid_argument& error) {  // it depends on what `declines` is not told
    throw declined_by(algorithm, error.what());
  }
  if (asked_to_log("config"))
    std::fprintf(stderr, "deconv_ext: %s %s%s%s\n", op_name(op), chosen.name,
                 used.empty() ? "" : ":", used.c_str());
}

void grad_bias(const GradBiasParams& params, const Context& context) {
  if (params.c_out == 0) return;
  if (params.dtype == Dtype::kInt64) return generic_grad_bias(params, context.stream);
  reduce_grad_bias(params, context);
}

std::vector<std::string> algorithms(Op op) {
  std::vector<std::string> names;
  for (const Algorithm& algorithm : kAlgorithms) {
    names.emplace_back(algorithm.name);
    for (const std::string& config : algorithm.configs(op))
      names.push_back(std::string(algorithm.name) + ":" + config);
  }
  return names;
}

}  // namespace cuda
}  // namespace deconv
