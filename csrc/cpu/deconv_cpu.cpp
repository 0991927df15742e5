// The CPU's entry: which instruction set, which algorithm.
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "../deconv.h"
#include "../reference/reference.h"
#include "kernels.h"

namespace deconv {
namespace cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------------
// Instruction sets

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  for (const Kernels* kernels : {avx512_kernels(), avx2_kernels(), portable_kernels()})
    if (kernels && kernels->supported()) usable.push_back(kernels);
  return usable;
}

const Kernels* find_kernels(const std::string& name, const char* asked_by) {
  std::string names;
  for (const Kernels* kernels : usable_kernels()) {
    if (name == kernels->isa) return kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::runtime_error(std::string(asked_by) +
                           " must name an instruction set of this machine (" + names +
                           "), but got '" + name + "'");
}

std::atomic<const Kernels*> kernels_in_use{nullptr};

const Kernels& kernels() {
  const Kernels* current = kernels_in_use.load(std::memory_order_acquire);
  if (!current) {
    const char* forced = std::getenv("DECONV_EXT_CPU_ISA");
    current =
        forced && *forced ? find_kernels(forced, "DECONV_EXT_CPU_ISA") : usable_kernels().front();
    kernels_in_use.store(current, std::memory_order_release);
  }
  return *current;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Algorithms

bool is_integer(const Params& p) { return p.dtype == Dtype::kInt64; }

// Up to this many products of channels a group, reuse within a matrix product is too small to pay
// for packing.
constexpr int64_t kDirectProducts = 8;

struct Algorithm {
  const char* name;
  const char* (*declines)(const Params&);  // the condition that fails, or null
  bool (*preferred)(const Params&);        // whether "auto" stops here
  void (*run)(Op, const Params&, int threads);
};

const char* needs_floats(const Params& p) {
  return is_integer(p) ? "it needs a floating point dtype" : nullptr;
}

const char* needs_depthwise(const Params& p) {
  if (is_integer(p)) return needs_floats(p);
  if (p.problem.groups != p.problem.c_in || p.problem.groups != p.problem.c_out)
    return "it needs groups == in_channels == out_channels";
  return p.x.stride[1] == 1 && p.y.stride[1] == 1 ? nullptr : "it needs channels_last tensors";
}

const Algorithm kAlgorithms[] = {
    {"depthwise", needs_depthwise, [](const Params&) { return true; },
     [](Op op, const Params& p, int threads) { kernels().depthwise(op, p, threads); }},
    {"direct", needs_floats,
     [](const Params& p) {
       return (p.problem.c_in / p.problem.groups) * (p.problem.c_out / p.problem.groups) <=
              kDirectProducts;
     },
     [](Op op, const Params& p, int threads) { kernels().direct(op, p, threads); }},
    {"gemm", needs_floats, [](const Params&) { return true; },
     [](Op op, const Params& p, int threads) {
       op == Op::kGradWeight ? kernels().weight_gemm(p, threads)
                             : kernels().gather_gemm(op, p, threads);
     }},
    {"reference", [](const Params&) -> const char* { return nullptr; },
     [](const Params&) { return true; }, reference::run},
};

// Below this many multiply-adds a second thread costs more than it brings.
constexpr double kMultiplyAddsForThreads = 50e3;

int useful_threads(const Problem& p, int threads) {
  const double multiply_adds = static_cast<double>(p.batch * p.c_in * p.h.in * p.w.in) *
                               static_cast<double>(p.c_out / p.groups) *
                               static_cast<double>(p.h.kernel * p.w.kernel);
  return multiply_adds < kMultiplyAddsForThreads ? 1 : threads;
}

}  // namespace

void run(Op op, const Params& params, const std::string& name, int threads) {
  std::string names = "auto";
  threads = useful_threads(params.problem, threads);
  for (const Algorithm& algorithm : kAlgorithms) {
    const char* declined = algorithm.declines(params);
    if (name == "auto" ? !declined && algorithm.preferred(params) : name == algorithm.name) {
      if (declined)
        throw std::invalid_argument("algo='" + name + "' cannot take this problem: " + declined);
      return algorithm.run(op, params, threads);
    }
    names += std::string(", ") + algorithm.name;
  }
  throw std::invalid_argument("algo must be one of " + names + ", but got '" + name + "'");
}

void grad_bias(const GradBiasParams& params, int threads) {
  if (params.dtype == Dtype::kInt64) return reference::grad_bias(params);
  const bool small = static_cast<double>(params.batch * params.c_out * params.out_h *
                                         params.out_w) < kMultiplyAddsForThreads;
  kernels().grad_bias(params, small ? 1 : threads);
}

std::vector<std::string> algorithms(Op) {
  std::vector<std::string> names;
  for (const Algorithm& algorithm : kAlgorithms) names.emplace_back(algorithm.name);
  return names;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : usable_kernels()) names.emplace_back(kernels->isa);
  return names;
}

std::string isa() { return kernels().isa; }

void set_isa(const std::string& name) {
  kernels_in_use.store(find_kernels(name, "set_cpu_isa"), std::memory_order_release);
}

}  // namespace cpu
}  // namespace deconv
