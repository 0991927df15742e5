// Pairs of bfloat16 in vector registers, by the dot product of AVX512-BF16:
//
//     sum[lane] += a[lane].even * b[lane].even + a[lane].odd * b[lane].odd
//
// Products are exact, sums are float32. Denormal operands and results count as zero, whatever the
// caller's setting: the instructions know no other way. The tiles are those of float32
// (microkernel.h), with a pair where they have a number.
#pragma once

#include "pair_tiles.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

struct DotProduct {
  template <class T>
  DECONV_INLINE static void add(Vector<T>& sum, Vector<T> a, Vector<T> b) {
#ifdef DECONV_EMULATED
    sum = emulated::dpbf16_ps(sum, a, b);
#else
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#endif
  }
  template <class T>
  DECONV_INLINE static void add(Vector<T>& sum, const T* a, Vector<T> b) {
#ifdef DECONV_EMULATED
    add<T>(sum, broadcast(*a), b);
#else
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(b), "m"(*a));
#endif
  }
  DECONV_INLINE static void store(float* p, Vector<float> sum) { store_vector(p, sum); }
  // Rounded.
  DECONV_INLINE static void store(BFloat16* p, Vector<float> sum) {
#ifdef DECONV_EMULATED
    store_as(p, sum);
#else
    HalfWords words;
    asm("vcvtneps2bf16 %1, %0" : "=v"(words) : "v"(sum));
    __builtin_memcpy(p, &words, sizeof(words));
#endif
  }
};

// While it exists, denormals count as zero for all arithmetic of the thread: so a bias that is
// added elsewhere, and what is rounded by other instructions, come out the same.
class FlushedDenormals {
 public:
  FlushedDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kOperands | kResults); }
  ~FlushedDenormals() { _mm_setcsr(before_); }
  FlushedDenormals(const FlushedDenormals&) = delete;
  FlushedDenormals& operator=(const FlushedDenormals&) = delete;

 private:
  static constexpr unsigned kOperands = 0x40, kResults = 0x8000;
  const unsigned before_;
};

#ifdef DECONV_EMULATED
inline bool dot_products_win() { return true; }
#else
// The least cycles, of some trials, that so many steps of independent sums take.
template <class Multiply>
DECONV_PHASE uint64_t dot_trial_cycles() {
  constexpr int kSums = 12, kSteps = 256, kTrials = 16;
  uint64_t least = ~uint64_t{0};
  for (int trial = 0; trial < kTrials; ++trial) {
    Vector<float> sum[kSums] = {}, factor{};
    const uint64_t begin = __rdtsc();
    for (int step = 0; step < kSteps; ++step)
      unroll<kSums>([&](auto i)
                        DECONV_INLINED { Multiply::template add<float>(sum[i], factor, factor); });
    unroll<kSums>([&](auto i) DECONV_INLINED { asm volatile("" ::"v"(sum[i])); });
    least = min_of<uint64_t>(least, __rdtsc() - begin);
  }
  return least;
}

// Whether this processor multiplies pairs faster than their numbers one by one: some take twice as
// long for a dot product as for a multiply-add, others no longer. Pairs take more packing.
inline bool dot_products_win() {
  return 2 * dot_trial_cycles<MultiplyAdd>() > 1.3 * dot_trial_cycles<DotProduct>();
}
#endif

template <int RM, int RN>
void multiply_dot_strips(const PairStrip* strips, int64_t count, const int64_t* row, float* c,
                         int64_t pitch, bool accumulate) {
  constexpr int kN = kLanes<float>;
  Vector<float> sum[RM * RN];
  int64_t distance[RM];
  const auto place = [&](int i) DECONV_INLINED { return c + i / RN * pitch + i % RN * kN; };
  unroll<RM>([&](auto m) DECONV_INLINED { distance[m] = row[m] * sizeof(BFloat16); });
  unroll<RM * RN>([&](auto i) DECONV_INLINED {
    sum[i] = accumulate ? load_vector(place(i)) : Vector<float>{};
  });
  for (int64_t s = 0; s < count; ++s)
    multiply_segment<float, RM, RN, Steps::kContiguousA, DotProduct>(
        reinterpret_cast<const float*>(strips[s].a), strips[s].b, strips[s].pairs, distance, 0, 0,
        sum);
  unroll<RM * RN>([&](auto i) DECONV_INLINED { store_vector(place(i), sum[i]); });
}

template <int RM, int RN>
constexpr PairTile make_dot_tile() {
  return {{RM, RN, multiply_tiles<float, RM, RN, Steps::kContiguousA, 1, DotProduct>,
           multiply_tiles<float, RM, RN, Steps::kPanelA, 1, DotProduct>, nullptr, nullptr, nullptr,
           multiply_tiles<float, RM, RN, Steps::kContiguousA, 1, DotProduct, BFloat16>,
           multiply_short_by<float, RN, DotProduct, BFloat16>},
          multiply_dot_strips<RM, RN>};
}

// How pairs are multiplied, as gather_pairs.h and weight_pairs.h ask for it.
struct Dot {
  using Session = FlushedDenormals;
  static constexpr int64_t kUnit = 1;
  static constexpr PairTile kTiles[] = {make_dot_tile<8, 3>(), make_dot_tile<6, 4>(),
                                        make_dot_tile<9, 3>(), make_dot_tile<4, 4>(),
                                        make_dot_tile<8, 2>(), make_dot_tile<8, 1>()};

  static double cycles_per_step(int rows, int vectors) {
    return cpu::cycles_per_step(rows, vectors);
  }
  static constexpr bool kTakesTaps = true, kRounds = true;
  static bool takes(int64_t channels) { return channels % 2 == 0; }
  // Rows of a tile of grad_weight lie anywhere in the patches.
  static constexpr bool kAnyRows = true;
  // With half of the lanes empty, half of a vector is as good (isa_avx512.cpp).
  static bool takes_weight(int64_t, int64_t lanes) { return 2 * lanes > kLanes<float>; }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
