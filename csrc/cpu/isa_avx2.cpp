// The CPU kernels for AVX-2. Standard headers come before the switch of target, so that nothing
// shared is compiled for it.
#include <immintrin.h>

#include <memory>
#include <vector>

#include "../half.h"
#include "../parallel.h"
#include "../reference/elements.h"
#include "gather.h"
#include "kernels.h"
#include "profile.h"
#include "row_plan.h"
#include "scratch.h"
#include "winograd_plan.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
#define DECONV_ISA avx2
#define DECONV_VECTOR_BYTES 32
#define DECONV_VECTOR_REGISTERS 16
#include "instantiate.h"
#pragma GCC pop_options

namespace deconv {
namespace cpu {
namespace {
bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = avx2::table("avx2", supported);
  return &kernels;
}
}  // namespace cpu
}  // namespace deconv
#else
const deconv::cpu::Kernels* deconv::cpu::avx2_kernels() { return nullptr; }
#endif
