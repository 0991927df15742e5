// What one instruction set offers: the same functions for each, found at run time (deconv_cpu.cpp).
#pragma once

#include "../params.h"

namespace deconv {
namespace cpu {

struct Kernels {
  const char* isa;
  bool (*supported)();  // by this machine
  bool (*wins)();       // against the next ones, where that has to be tried; else null
  int lanes;            // float32 elements of a vector
  void (*gather_gemm)(Op, const Params&, int threads);
  void (*winograd)(Op, const Params&, int threads);
  bool (*prefers_winograd)(Op, const Params&);  // to gather_gemm
  void (*weight_gemm)(const Params&, int threads);
  void (*direct)(Op, const Params&, int threads);
  void (*depthwise)(Op, const Params&, int threads);
  void (*grad_bias)(const GradBiasParams&, int threads);
};

// Null where the compiler or the architecture lacks the instruction set.
const Kernels* amx_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace cpu
}  // namespace deconv
