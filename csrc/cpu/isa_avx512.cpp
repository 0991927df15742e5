// The CPU kernels for AVX-512, and with AMX where a processor has that too. Standard headers come
// before the switch of target, so that nothing shared is compiled for it.
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
#include "winograd_plan.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 11 && defined(__linux__)
#define DECONV_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#pragma GCC push_options
#ifdef DECONV_EMULATED
#pragma GCC target("avx2,fma,f16c,bmi2")
#include "emulated_avx512.h"
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2,prefer-vector-width=512")
#endif
#define DECONV_ISA avx512
#define DECONV_VECTOR_BYTES 64
#define DECONV_VECTOR_REGISTERS 32
#include "instantiate.h"
#ifdef DECONV_AMX
#include "gather_amx.h"
#include "weight_amx.h"
#endif
#pragma GCC pop_options

namespace deconv {
namespace cpu {
namespace {
bool supported() {
#ifdef DECONV_EMULATED
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
}
}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = avx512::table("avx512", supported);
  return &kernels;
}

#ifdef DECONV_AMX
namespace {
// The processor has AMX for bfloat16, and the system lets this process use its registers, for which
// one has to ask.
bool amx_supported() {
#ifdef DECONV_EMULATED
  return supported();
#endif
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  static const bool granted = supported() && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
                              (d & kBf16) && (d & kTile) &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

void gather_gemm_or_amx(Op op, const Params& params, int threads) {
  avx512::amx_takes(op, params) ? avx512::gather_amx(op, params, threads)
                                : avx512_kernels()->gather_gemm(op, params, threads);
}

void weight_gemm_or_amx(const Params& params, int threads) {
  avx512::amx_takes_weight(params) ? avx512::weight_amx(params, threads)
                                   : avx512_kernels()->weight_gemm(params, threads);
}

bool prefers_winograd_to_amx(Op op, const Params& params) {
  return !avx512::amx_takes(op, params) && avx512_kernels()->prefers_winograd(op, params);
}
}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = [] {
    Kernels all = avx512::table("amx", amx_supported);
    all.gather_gemm = gather_gemm_or_amx;
    all.weight_gemm = weight_gemm_or_amx;
    all.prefers_winograd = prefers_winograd_to_amx;
    return all;
  }();
  return &kernels;
}
#else
const Kernels* amx_kernels() { return nullptr; }
#endif
}  // namespace cpu
}  // namespace deconv
#else
const deconv::cpu::Kernels* deconv::cpu::avx512_kernels() { return nullptr; }
const deconv::cpu::Kernels* deconv::cpu::amx_kernels() { return nullptr; }
#endif
