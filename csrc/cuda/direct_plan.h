// What the direct kernels are given, and how it is chosen: plain C++ for the host, so that the
// choice is tested without a GPU. direct.cuh gathers, direct_weight.cuh sums over pixels.
//
// forward and grad_input are one gather over the tap tables of geometry.h:
//
//     target[n, c, j * target_step + r] = activation(bias[c] + sum over sources s of c's group,
//     taps
//         (k, offset) of phase r, of source[n, s, j * source_step + offset] * weight[s, c, k])
//
// on both axes. A thread owns some channels and a run of positions of one target row. Where the
// taps of the columns are a Pattern known to the compiler, it owns all phases of its positions:
// in NCHW it then writes a gapless run. Otherwise it owns positions of one phase, and
// neighbouring lanes own neighbouring columns.
#pragma once

#include <algorithm>
#include <string>

#include "../deconv.h"

namespace deconv {
namespace cuda {
namespace direct {

constexpr int kThreads = 256;               // of a block, at most
constexpr int kSharedBytes = 48 << 10;      // of weights, if the block can be made small enough
constexpr int kMostSharedBytes = 96 << 10;  // what a block may have from sm_80 on
constexpr int kMostTaps = 64;               // of an axis
constexpr int kLoadBytes = 16;              // of the widest access

// ---- Column patterns: taps that are unrolled at compile time ------------------------------------

// Phase r takes source column j * kStep + kFirst + c where bit c of masks[r] is set.
template <int kStep_, int kFirst_, int kWindow_, unsigned... masks>
struct Pattern {
  static constexpr int kStep = kStep_, kFirst = kFirst_, kWindow = kWindow_;
  static constexpr int kPhases = sizeof...(masks);
  static constexpr uint64_t packed() {
    uint64_t all = 0;
    int shift = 0;
    ((all |= uint64_t(masks) << shift, shift += kWindow_), ...);
    return all;
  }
  static constexpr uint64_t kMasks = packed();
  DECONV_HOST_DEVICE static constexpr bool has(int phase, int c) {
    return kMasks >> (phase * kWindow + c) & 1;
  }
  static_assert(((masks >> kWindow_ == 0) && ...), "a tap outside the window");
  static_assert(kPhases * kWindow <= 64, "the masks are one word");
};

struct Unknown {  // taps known at run time only
  static constexpr int kStep = 1, kPhases = 1, kFirst = 0, kWindow = 0;
};

template <class... P>
struct Patterns {};

// By kernel, stride and padding of the layers that ask for them: bilinear and learnt upsampling,
// image heads, FSRCNN.
using ForwardPatterns = Patterns<Pattern<1, 0, 1, 1, 1>,                     // 2, 2, 0
                                 Pattern<1, 0, 2, 1, 3>,                     // 3, 2, 1
                                 Pattern<1, -1, 3, 3, 6>,                    // 4, 2, 1
                                 Pattern<1, -1, 3, 3, 3, 6, 6>,              // 8, 4, 2
                                 Pattern<1, -1, 3, 3, 3, 3, 3, 6, 6, 6, 6>,  // 16, 8, 4
                                 Pattern<1, -2, 5, 31, 30>,                  // 9, 2, 4
                                 Pattern<1, -1, 4, 7, 7, 14>>;               // 9, 3, 4
using GradInputPatterns = Patterns<Pattern<2, 0, 2, 3>,                      // 2, 2, 0
                                   Pattern<2, -1, 3, 7>,                     // 3, 2, 1
                                   Pattern<2, -1, 4, 15>,                    // 4, 2, 1
                                   Pattern<4, -2, 8, 0xff>,                  // 8, 4, 2
                                   Pattern<8, -4, 16, 0xffff>,               // 16, 8, 4
                                   Pattern<2, -4, 9, 0x1ff>,                 // 9, 2, 4
                                   Pattern<3, -4, 9, 0x1ff>>;                // 9, 3, 4

// ---- Configurations -----------------------------------------------------------------------------

// Channels of the target and of the source that a thread holds at a time. `paired`: each source
// channel goes to its own target channel alone (depthwise); otherwise each goes to all.
template <int targets, int sources, bool paired, bool unrolled>
struct Config {
  static constexpr int kTargets = targets, kSources = sources;
  static constexpr bool kPaired = paired, kUnrolled = unrolled;
  static_assert(!paired || targets == sources, "a pair has one channel on each side");
};

struct ConfigInfo {
  const char* name;
  int targets, sources;
  bool paired, unrolled;
};

template <class C>
constexpr ConfigInfo info(const char* name) {
  return {name, C::kTargets, C::kSources, C::kPaired, C::kUnrolled};
}

using OneChannel = Config<1, 1, false, true>;
using FourTargets = Config<4, 1, false, true>;
using FourSources = Config<1, 4, false, true>;
using FourByFour = Config<4, 4, false, true>;
using FourPairs = Config<4, 4, true, true>;
using AnyOneChannel = Config<1, 1, false, false>;
using AnyFourTargets = Config<4, 1, false, false>;
using AnyFourPairs = Config<4, 4, true, false>;

constexpr ConfigInfo kConfigs[] = {
    info<FourPairs>("four_pairs"),             // 0
    info<FourByFour>("four_by_four"),          // 1
    info<FourSources>("four_sources"),         // 2
    info<FourTargets>("four_targets"),         // 3
    info<OneChannel>("one_channel"),           // 4
    info<AnyFourPairs>("any_four_pairs"),      // 5
    info<AnyFourTargets>("any_four_targets"),  // 6
    info<AnyOneChannel>("any_one_channel"),    // 7
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(ConfigInfo);

// Which are compiled: every pattern for one channel and for pairs, where it is cheap; those of
// three taps a row and less for four channels.
template <class C, class P>
constexpr bool compiled() {
  if (C::kSources == 1 && C::kTargets == 1) return true;
  const bool wide = P::kWindow == 9 || P::kStep < P::kPhases && P::kWindow > 3;
  if (C::kPaired) return !wide;
  if (C::kSources == 4) return P::kStep == 1 && P::kPhases <= 3 && (C::kTargets == 1 || !wide);
  return P::kPhases <= 2 && P::kWindow <= 4;
}

DECONV_HOST_DEVICE constexpr int power_of_two_below(int limit) {
  int power = 1;
  while (2 * power <= limit) power *= 2;
  return power;
}
DECONV_HOST_DEVICE constexpr int power_of_two_in(int number) { return number & -number; }

// Positions a thread owns: as many as fill a 16-byte access, as far as registers allow.
template <class T, class C, class P>
DECONV_HOST_DEVICE constexpr int positions_of() {
  if (!C::kUnrolled) return 4;
  const int most = (C::kSources == 1 ? 16 : 8) / (P::kStep > P::kPhases ? P::kStep : P::kPhases);
  // A small window does little work for its weights and stores, so a run is one access of the
  // target: no sector is written in two halves.
  const int vector = kLoadBytes / sizeof(T);
  if (C::kSources == 1 && P::kWindow <= 4 && P::kPhases > 1)
    return power_of_two_below(vector > P::kPhases ? vector / P::kPhases : 1);
  return power_of_two_below(most < vector ? most : vector);
}

// Elements of the aligned accesses along a row, where runs begin at multiples of `run` elements.
DECONV_HOST_DEVICE constexpr int vector_of(int run, int element_bytes) {
  const int most = kLoadBytes / element_bytes, power = power_of_two_in(run);
  return power < most ? power : most;
}

// ---- Arguments ----------------------------------------------------------------------------------

struct AxisArgs {
  int32_t source, target, source_step, target_step, positions;
  int32_t phases;
  int16_t begin[kMostTaps + 1];  // taps of phase r: [begin[r], begin[r + 1])
  int16_t k[kMostTaps];
  int32_t offset[kMostTaps];
};

// Block: a sample, `unit_lanes` units of channels, `row_phases` phases of rows, a tile of rows and
// one of columns. Thread: lanes [unit fastest][column][row].
struct GatherArgs {
  const void *source, *weight, *bias;
  void* target;
  int64_t source_stride[4], target_stride[4];
  int64_t weight_group, weight_source, weight_target, weight_h, weight_w, bias_stride;
  Activation activation;
  double negative_slope;
  int32_t channels, group_sources, group_targets, group_units, units;
  AxisArgs rows;
  AxisArgs columns;
  int16_t slot_k[kMostTaps + 1];  // kernel column in each slot of a row of weights, or -1
  int32_t slots;                  // odd, so that lanes of different channels meet different banks
  int32_t unit_lanes, column_lanes, row_lanes, row_phases, row_steps, most_row_taps;
  int32_t unit_blocks, row_phase_blocks, row_tiles, column_tiles;
  bool vector_source, vector_target_row, vector_target_channels;
};
static_assert(sizeof(GatherArgs) <= 4096, "kernel arguments");

struct GatherPlan {
  GatherArgs args;
  int64_t batch;
  int blocks, threads, shared_bytes;
};

// What of a configuration and a pattern the plan depends on.
struct Shape {
  ConfigInfo config;
  int positions, step, phases, first, window;  // of a run of columns; window 0: run-time taps
  int element_bytes;
};

template <class T, class C, class P>
constexpr Shape shape_of(const ConfigInfo& config) {
  return {config, positions_of<T, C, P>(), P::kStep, P::kPhases, P::kFirst, P::kWindow, sizeof(T)};
}

// Whether the columns of this problem have the taps of P.
template <class P>
bool matches(const AxisArgs& columns) {
  if (columns.source_step != P::kStep || columns.phases != P::kPhases ||
      columns.target_step != P::kPhases)
    return false;
  for (int r = 0; r < P::kPhases; ++r) {
    int taps = 0;
    for (int tap = columns.begin[r]; tap < columns.begin[r + 1]; ++tap) {
      const int c = columns.offset[tap] - P::kFirst;
      if (c < 0 || c >= P::kWindow || !P::has(r, c)) return false;
      ++taps;
    }
    for (int c = 0; c < P::kWindow; ++c) taps -= P::has(r, c);
    if (taps != 0) return false;
  }
  return true;
}

// Why offsets within a plane do not fit 32 bits, or null.
const char* too_large(const Params& params);
// Whether "auto" should consider the configuration: it holds together what lies together.
bool suits(const ConfigInfo& config, const GatherArgs& args);
// Why no direct kernel takes the problem, or null; the arguments that do not depend on a shape.
const char* gather_args(Op op, const Params& params, GatherArgs& args);
// Why this one does not; fills the plan.
const char* plan_gather(const Shape& shape, const GatherArgs& args, GatherPlan& plan);

// grad_weight (direct_weight.cu).
const char* weight_declines(const Params& params, const std::string& config);
void run_weight(const Params& params, const Context& context);

}  // namespace direct
}  // namespace cuda
}  // namespace deconv
