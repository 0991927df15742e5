// Which direct kernel: the first configuration that suits the layout and takes the problem.
#include "direct.cuh"
#include "launch.h"

namespace deconv {
namespace cuda {
namespace direct {
namespace {

struct Choice {
  const char* declined;  // null: the rest is filled
  const char* config;
  void (*kernel)(GatherArgs);
  GatherPlan plan;
};

template <class T, class C, class P>
bool try_pattern(const ConfigInfo& config, const GatherArgs& args, Choice& choice) {
  if constexpr (compiled<C, P>()) {
    if (!matches<P>(args.columns)) return false;
    choice.declined = plan_gather(shape_of<T, C, P>(config), args, choice.plan);
    choice.kernel = gather_direct_kernel<T, C, P>;
    return true;
  }
  return false;
}

template <class T, class C, class... P>
void try_patterns(Patterns<P...>, const ConfigInfo& config, const GatherArgs& args,
                  Choice& choice) {
  choice.declined = "its columns are none of the unrolled patterns";
  (try_pattern<T, C, P>(config, args, choice) || ...);
}

template <class T, class C>
void try_config(Op op, const ConfigInfo& config, const GatherArgs& args, Choice& choice) {
  choice.config = config.name;
  if constexpr (!C::kUnrolled) {
    choice.declined = plan_gather(shape_of<T, C, Unknown>(config), args, choice.plan);
    choice.kernel = gather_direct_kernel<T, C, Unknown>;
  } else if constexpr (sizeof(T) == 8) {
    choice.declined = "float64 has no unrolled patterns";
  } else {
    op == Op::kForward ? try_patterns<T, C>(ForwardPatterns(), config, args, choice)
                       : try_patterns<T, C>(GradInputPatterns(), config, args, choice);
  }
}

template <class T>
void try_number(Op op, int number, const GatherArgs& args, Choice& choice) {
  const ConfigInfo& config = kConfigs[number];
  switch (number) {
    case 0:
      return try_config<T, FourPairs>(op, config, args, choice);
    case 1:
      return try_config<T, FourByFour>(op, config, args, choice);
    case 2:
      return try_config<T, FourSources>(op, config, args, choice);
    case 3:
      return try_config<T, FourTargets>(op, config, args, choice);
    case 4:
      return try_config<T, OneChannel>(op, config, args, choice);
    case 5:
      return try_config<T, AnyFourPairs>(op, config, args, choice);
    case 6:
      return try_config<T, AnyFourTargets>(op, config, args, choice);
    case 7:
      return try_config<T, AnyOneChannel>(op, config, args, choice);
  }
}

template <class T>
Choice choose_typed(Op op, const GatherArgs& args, int64_t batch, const std::string& name) {
  Choice choice{"it has no such configuration", nullptr, nullptr, {}};
  choice.plan.batch = batch;
  for (int number = 0; number < kConfigCount; ++number) {
    if (name.empty() ? !suits(kConfigs[number], args) : name != kConfigs[number].name) continue;
    try_number<T>(op, number, args, choice);
    if (!choice.declined) break;
  }
  return choice;
}

Choice choose(Op op, const Params& p, const std::string& name) {
  GatherArgs args{};
  if (const char* declined = gather_args(op, p, args)) return {declined, nullptr, nullptr, {}};
  switch (p.dtype) {
    case Dtype::kFloat32:
      return choose_typed<float>(op, args, p.problem.batch, name);
    case Dtype::kFloat64:
      return choose_typed<double>(op, args, p.problem.batch, name);
    case Dtype::kFloat16:
      return choose_typed<Float16>(op, args, p.problem.batch, name);
    default:
      return choose_typed<BFloat16>(op, args, p.problem.batch, name);
  }
}

}  // namespace
}  // namespace direct

std::vector<std::string> direct_configs(Op op) {
  std::vector<std::string> names;
  for (const direct::ConfigInfo& config : direct::kConfigs) {
    const bool several_sources = config.sources > 1 && !config.paired;  // forward's alone
    if (op == Op::kForward || (op == Op::kGradInput && !several_sources))
      names.emplace_back(config.name);
  }
  return names;
}

const char* direct_declines(Op op, const Params& p, const std::string& config) {
  if (op == Op::kGradWeight) return direct::weight_declines(p, config);
  return direct::choose(op, p, config).declined;
}

std::string run_direct(Op op, const Params& p, const std::string& config, const Context& context) {
  if (op == Op::kGradWeight) {
    direct::run_weight(p, context);
    return "";
  }
  const direct::Choice choice = direct::choose(op, p, config);
  launch(choice.kernel, dim3(choice.plan.blocks), dim3(choice.plan.threads),
         choice.plan.shared_bytes, context.stream, choice.plan.args, "gather_direct");
  return choice.config;
}

}  // namespace cuda
}  // namespace deconv
