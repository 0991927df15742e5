// The CPU kernels for AVX-512, and with its dot products of bfloat16 or with AMX where a processor
// has these too. Standard headers come before the switch of target, so that nothing shared is
// compiled for it.
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
#define DECONV_PAIRS  // instructions that the assembler has to know
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
#ifdef DECONV_PAIRS
#include "amx.h"
#include "dot.h"
#include "gather_pairs.h"
#include "weight_pairs.h"
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

const Kernels& full_vectors() {
  static const Kernels kernels = avx512::table("avx512", supported);
  return kernels;
}

// Vectors of which half stays empty take as many instructions as half of them by AVX2, which some
// processors execute in half of the time and none in more.
bool half_is_enough(int64_t lanes, const Params& params) {
  const int whole = full_vectors().lanes / (params.dtype == Dtype::kFloat64 ? 2 : 1);
  return 2 * lanes <= whole && avx2_kernels() && avx2_kernels()->supported();
}

bool half_is_enough(Op op, const Params& params) {
  const Problem& p = params.problem;
  const bool forward = op == Op::kForward;
  const int64_t rows = forward ? p.c_out * p.h.stride * p.w.stride : p.c_in;
  if (!half_is_enough(rows / p.groups, params)) return false;
  bool rows_across = false;
  avx512::with_storage(params.dtype, [&](auto s) {
    rows_across = avx512::gather_has_rows_across<decltype(s)>(op, params);
  });
  return rows_across;
}
}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = [] {
    Kernels all = full_vectors();
    all.gather_gemm = [](Op op, const Params& params, int threads) {
      (half_is_enough(op, params) ? *avx2_kernels() : full_vectors())
          .gather_gemm(op, params, threads);
    };
    all.weight_gemm = [](const Params& params, int threads) {
      const int64_t lanes = params.problem.c_in / params.problem.groups;
      (half_is_enough(lanes, params) ? *avx2_kernels() : full_vectors())
          .weight_gemm(params, threads);
    };
    return all;
  }();
  return &kernels;
}

#ifdef DECONV_PAIRS
namespace {
bool has_dot_products() {
#ifdef DECONV_EMULATED
  return supported();
#endif
  constexpr unsigned kBf16 = 1u << 5;
  unsigned a, b, c, d;
  return supported() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16);
}

// The processor has AMX for bfloat16, and the system lets this process use its registers, for which
// one has to ask.
bool has_amx() {
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

// The kernels of AVX-512, but for what Format takes.
template <class Format>
Kernels with_pairs(const char* isa, bool (*has_them)()) {
  Kernels all = avx512::table(isa, has_them);
  all.gather_gemm = [](Op op, const Params& params, int threads) {
    avx512::pairs_of<Format>(op, params) != Pairs::kNone
        ? avx512::gather_pairs<Format>(op, params, threads)
        : avx512_kernels()->gather_gemm(op, params, threads);
  };
  all.weight_gemm = [](const Params& params, int threads) {
    avx512::pairs_take_weight<Format>(params) ? avx512::weight_pairs<Format>(params, threads)
                                              : avx512_kernels()->weight_gemm(params, threads);
  };
  all.prefers_winograd = [](Op op, const Params& params) {
    return avx512::pairs_of<Format>(op, params) != Pairs::kChannels &&
           avx512_kernels()->prefers_winograd(op, params);
  };
  return all;
}
}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kernels = with_pairs<avx512::Amx>("amx", has_amx);
  return &kernels;
}

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels all = with_pairs<avx512::Dot>("avx512_bf16", has_dot_products);
    all.wins = [] {
      static const bool wins = avx512::dot_products_win();
      return wins;
    };
    return all;
  }();
  return &kernels;
}
#else
const Kernels* amx_kernels() { return nullptr; }
const Kernels* avx512_bf16_kernels() { return nullptr; }
#endif
}  // namespace cpu
}  // namespace deconv
#else
const deconv::cpu::Kernels* deconv::cpu::avx512_kernels() { return nullptr; }
const deconv::cpu::Kernels* deconv::cpu::avx512_bf16_kernels() { return nullptr; }
const deconv::cpu::Kernels* deconv::cpu::amx_kernels() { return nullptr; }
#endif
