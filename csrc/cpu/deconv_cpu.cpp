// The CPU's entry: which instruction set, which algorithm.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <numeric>
#include <stdexcept>

#include "../choices.h"
#include "../deconv.h"
#include "../log.h"
#include "../reference/reference.h"
#include "kernels.h"
#include "profile.h"
#include "winograd_plan.h"

namespace deconv {
namespace cpu {
namespace {

// ---------------------------------------------------------------------------------------------------------------------------
// Instruction sets

std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable;
  for (const Kernels* kernels :
       {amx_kernels(), avx512_bf16_kernels(), avx512_kernels(), avx2_kernels(), portable_kernels()})
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

const Kernels* best_kernels() {
  const std::vector<const Kernels*> usable = usable_kernels();
  return *std::find_if(usable.begin(), usable.end(),
                       [](const Kernels* kernels) { return !kernels->wins || kernels->wins(); });
}

std::atomic<const Kernels*> kernels_in_use{nullptr};

const Kernels& kernels() {
  const Kernels* current = kernels_in_use.load(std::memory_order_acquire);
  if (!current) {
    const char* forced = std::getenv("DECONV_EXT_CPU_ISA");
    current = forced && *forced ? find_kernels(forced, "DECONV_EXT_CPU_ISA") : best_kernels();
    kernels_in_use.store(current, std::memory_order_release);
  }
  return *current;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Algorithms

// Up to this many products of channels a group, reuse within a matrix product is too small to pay
// for packing.
constexpr int64_t kDirectProducts = 8;

double multiply_adds(const Problem& p) {
  return static_cast<double>(p.batch * p.c_in * p.h.in * p.w.in) *
         static_cast<double>(p.c_out / p.groups) * static_cast<double>(p.h.kernel * p.w.kernel);
}

bool has_few_channels(const Problem& p) {
  return (p.c_in / p.groups) * (p.c_out / p.groups) <= kDirectProducts;
}

// Where pixels are contiguous, few channels that are summed for three planes or more: the direct
// algorithm sums planes together and writes them from registers, while a matrix product would spend
// more on packing pixels and on putting phases side by side than on multiplying. With step one in
// the source each packed pixel serves several neighbouring taps, and more channels are few.
constexpr int64_t kFewChannels = 8, kFewSharedChannels = 16;
constexpr int64_t kLeastPlanes = 3;
// Rows that are read with a step above two are split element by element, which has to be worth it:
// so many multiply-adds for each element.
constexpr int64_t kSplitUses = 256;

bool sums_few_channels(Op op, const Params& params) {
  if (op == Op::kGradWeight || params.x.stride[3] != 1 || params.y.stride[3] != 1) return false;
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  const int64_t channels = (forward ? p.c_in : p.c_out) / p.groups,
                planes = (forward ? p.c_out : p.c_in) / p.groups, step = p.w.stride;
  // Otherwise there are phases without taps.
  if (p.w.kernel < step || std::gcd(step, p.w.dilation) != 1) return false;
  if (forward ? step > 2 && step != 4
              : step > 2 && planes * p.h.kernel * p.w.kernel < kSplitUses * p.h.stride * step)
    return false;
  const bool shared = (forward || step == 1) && p.w.kernel > step;
  return planes >= kLeastPlanes && p.w.in >= kernels().lanes &&
         channels <= (shared ? kFewSharedChannels : kFewChannels);
}

// forward plans one part for each phase. Strides of hundreds, where hardly any output has a tap,
// are not worth such a table.
constexpr int64_t kMostPhases = 4096;

bool has_many_phases(Op op, const Problem& p) {
  const int64_t h = std::min(p.h.stride, p.h.out), w = std::min(p.w.stride, p.w.out);
  return op == Op::kForward && (h > kMostPhases || w > kMostPhases || h * w > kMostPhases);
}

// With a kernel of one element and nothing but it, pixels have no neighbours: rows that follow each
// other without a gap are one long row, which no tile ends at.
Params join_rows(Params params) {
  Axis &h = params.problem.h, &w = params.problem.w;
  const auto plain = [](const Axis& axis) {
    return axis.kernel == 1 && axis.stride == 1 && axis.pad == 0 && axis.in == axis.out;
  };
  const auto dense = [&](const TensorRef& t) { return t.stride[2] == w.in * t.stride[3]; };
  if (!plain(h) || !plain(w) || !dense(params.x) || !dense(params.y)) return params;
  w.in = w.out = h.in * w.in;
  h.in = h.out = 1;
  return params;
}

struct Algorithm {
  const char* name;
  const char* (*declines)(Op, const Params&);  // the condition that fails, or null
  bool (*preferred)(Op, const Params&);        // whether "auto" stops here
  void (*run)(Op, const Params&, int threads);
};

const char* depthwise_declines(Op, const Params& p) {
  if (p.dtype == Dtype::kInt64) return "it needs a floating point dtype";
  if (p.problem.groups != p.problem.c_in || p.problem.groups != p.problem.c_out)
    return "it needs groups == in_channels == out_channels";
  return p.x.stride[1] == 1 && p.y.stride[1] == 1 ? nullptr : "it needs channels_last tensors";
}

const char* direct_declines(Op, const Params& p) {
  return p.dtype == Dtype::kInt64 ? "it needs a floating point dtype" : nullptr;
}

const char* gemm_declines(Op op, const Params& p) {
  if (p.dtype == Dtype::kInt64) return "it needs a floating point dtype";
  return has_many_phases(op, p.problem) ? "it needs stride_h * stride_w <= 4096" : nullptr;
}

// Fewer channels, and images of fewer multiply-adds, are not worth the additions, nor to think
// about it.
constexpr int64_t kWinogradChannels = 16;
constexpr double kWinogradWork = 16e6;

bool prefer_winograd(Op op, const Params& params) {
  static const bool allowed = [] {
    const char* value = std::getenv("DECONV_EXT_WINOGRAD");
    return !value || std::string(value) != "0";
  }();
  const Problem& p = params.problem;
  if (!allowed || op == Op::kGradWeight ||
      multiply_adds(p) < kWinogradWork * static_cast<double>(p.batch) ||
      std::min(p.c_in, p.c_out) < kWinogradChannels * p.groups)
    return false;
  static Remembered<bool> answers;
  Call call = describe(op, params, -1, 0, false);
  call.push_back(reinterpret_cast<intptr_t>(&kernels()));
  return answers(call, [&] {
    return !winograd_declines(op, params) && kernels().prefers_winograd(op, params);
  });
}

const char* never_declines(Op, const Params&) { return nullptr; }

bool always(Op, const Params&) { return true; }

bool prefer_direct(Op op, const Params& p) {
  return has_few_channels(p.problem) || sums_few_channels(op, p) || has_many_phases(op, p.problem);
}

void run_depthwise(Op op, const Params& p, int threads) { kernels().depthwise(op, p, threads); }

void run_direct(Op op, const Params& p, int threads) { kernels().direct(op, p, threads); }

void run_winograd(Op op, const Params& p, int threads) { kernels().winograd(op, p, threads); }

void run_gemm(Op op, const Params& p, int threads) {
  op == Op::kGradWeight ? kernels().weight_gemm(p, threads) : kernels().gather_gemm(op, p, threads);
}

// Best first.
const Algorithm kAlgorithms[] = {
    {"depthwise", depthwise_declines, always, run_depthwise},
    {"direct", direct_declines, prefer_direct, run_direct},
    {"winograd", winograd_declines, prefer_winograd, run_winograd},
    {"gemm", gemm_declines, always, run_gemm},
    {"reference", never_declines, always, reference::run},
};

// Below this many multiply-adds or outputs a second thread costs more than it brings.
constexpr double kWorkForThreads = 50e3;

int useful_threads(const Problem& p, int threads) {
  const double outputs =
      static_cast<double>(p.batch * p.c_out) * static_cast<double>(p.h.out * p.w.out);
  return multiply_adds(p) + outputs < kWorkForThreads ? 1 : threads;
}

}  // namespace

void run(Op op, const Params& given, const std::string& name, int threads) {
  std::string names = "auto";
  const Params params = join_rows(given);
  threads = useful_threads(params.problem, threads);
  for (const Algorithm& algorithm : kAlgorithms) {
    if (name == "auto" ? algorithm.preferred(op, params) : name == algorithm.name) {
      const char* declined = algorithm.declines(op, params);
      if (!declined) {
        const CallProfile profile(op_name(op), algorithm.name, threads);
        return algorithm.run(op, params, threads);
      }
      if (name != "auto")
        throw std::invalid_argument("algo='" + name + "' cannot take this problem: " + declined);
    }
    names += std::string(", ") + algorithm.name;
  }
  throw std::invalid_argument("algo must be one of " + names + ", but got '" + name + "'");
}

void grad_bias(const GradBiasParams& params, int threads) {
  if (params.dtype == Dtype::kInt64) return reference::grad_bias(params);
  const bool small = static_cast<double>(params.batch * params.c_out * params.out_h *
                                         params.out_w) < kWorkForThreads;
  kernels().grad_bias(params, small ? 1 : threads);
}

std::vector<std::string> algorithms(Op op) {
  std::vector<std::string> names;
  for (const Algorithm& algorithm : kAlgorithms)
    if (op != Op::kGradWeight || algorithm.run != run_winograd) names.emplace_back(algorithm.name);
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
