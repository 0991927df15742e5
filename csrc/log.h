// DECONV_EXT_LOG: what is told of each call on stderr.
#pragma once

#include <cstdlib>
#include <cstring>

#include "params.h"

namespace deconv {

// Whether the variable has this value.
inline bool asked_to_log(const char* what) {
  const char* value = std::getenv("DECONV_EXT_LOG");
  return value && std::strcmp(value, what) == 0;
}

inline const char* op_name(Op op) {
  return op == Op::kForward ? "forward" : op == Op::kGradInput ? "grad_input" : "grad_weight";
}

}  // namespace deconv
