// What deconv_cuda.cpp knows of an algorithm. The list of them stands there, best first.
#pragma once

#include <string>
#include <vector>

#include "../deconv.h"

namespace deconv {
namespace cuda {

struct Algorithm {
  const char* name;
  // The condition that fails, or null. `config` names a configuration; empty: any.
  const char* (*declines)(Op, const Params&, const std::string& config);
  bool (*preferred)(Op, const Params&);  // whether "auto" stops here
  // Enqueues the kernels; returns the configuration in words, for DECONV_EXT_LOG=config.
  std::string (*run)(Op, const Params&, const std::string& config, const Context&);
  std::vector<std::string> (*configs)(Op);  // that may be forced
};

}  // namespace cuda
}  // namespace deconv
