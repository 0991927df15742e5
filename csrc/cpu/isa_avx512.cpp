// The CPU kernels for AVX-512. Standard headers come before the switch of target, so that nothing
// shared is compiled for it.
#ifdef __x86_64__
#include <immintrin.h>
#endif

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

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#define DECONV_ISA avx512
#define DECONV_VECTOR_BYTES 64
#define DECONV_VECTOR_REGISTERS 32
#include "instantiate.h"
#pragma GCC pop_options

namespace deconv {
namespace cpu {
namespace {
bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = avx512::table("avx512", supported);
  return &kernels;
}
}  // namespace cpu
}  // namespace deconv
#else
const deconv::cpu::Kernels* deconv::cpu::avx512_kernels() { return nullptr; }
#endif
