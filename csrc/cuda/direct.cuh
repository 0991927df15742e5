// forward and grad_input by direct sums, for layers that memory bounds: depthwise and small groups,
// few inputs or outputs, large strides. The equation is in direct_plan.h.
//
// Schedule. A thread sums a run of positions of one target row for kTargets channels in registers:
// for each source channel s, for each tap of the row, for each tap of the columns. It reads the
// stretch of the source row that its run needs once per (s, row tap), in 16-byte accesses where
// rows are aligned, and writes its run once. Lanes lie along columns where the columns of the
// target are contiguous, along channels where these are. A source row is read by each target
// row that it meets, kernel_h in forward and kernel_h / stride_h in grad_input; most of them are
// rows of the same block, so that memory sees it once and L1 the rest.
//
// Shared memory: the block's weights as sums, [source][row tap][unit][slot][kTargets], the taps of
// its row phases alone. `slots` is odd: lanes that differ in the unit meet different banks; lanes
// that share it read one address.
//
// Roofline: (|source| + |target|) bytes once; 1 to 4 FLOP a byte in depthwise layers.
//
// A tap outside the image is skipped, not multiplied by zero, so that infinite weights do no harm.
#pragma once

#include "activate.cuh"
#include "direct_memory.cuh"
#include "direct_plan.h"

namespace deconv {
namespace cuda {
namespace direct {

// The weights of the block's channels and row phases; every thread helps.
template <class T, class C, class Sum>
__device__ void stage_weights(const GatherArgs& a, Sum* s_weight, int first_unit, int first_tap,
                              int taps) {
  const int sources = C::kPaired ? 1 : a.group_sources, channels = a.unit_lanes * C::kTargets;
  for (int i = threadIdx.x; i < sources * taps * channels; i += blockDim.x) {
    const int c = i % channels, tap = i / channels % taps, s = i / channels / taps;
    const int unit = first_unit + c / C::kTargets;
    const int group = C::kPaired ? unit * C::kTargets + c % C::kTargets : unit / a.group_units;
    const int in_group = C::kPaired ? 0 : unit % a.group_units * C::kTargets + c % C::kTargets;
    const bool exists =
        C::kPaired ? group < a.channels : unit < a.units && in_group < a.group_targets;
    const T* weight = static_cast<const T*>(a.weight) + group * a.weight_group +
                      s * a.weight_source + in_group * a.weight_target +
                      a.rows.k[first_tap + tap] * a.weight_h;
    Sum* to = s_weight +
              ((s * taps + tap) * a.unit_lanes + c / C::kTargets) * a.slots * C::kTargets +
              c % C::kTargets;
    for (int slot = 0; slot < a.slots; ++slot) {
      const int k = a.slot_k[slot];
      to[slot * C::kTargets] = exists && k >= 0 ? read<Sum>(weight + k * a.weight_w) : Sum(0);
    }
  }
}

// A thread's run of columns where the taps are the pattern P: kPositions neighbouring positions
// with all their phases. Output i is phase i % kPhases of position i / kPhases.
template <class T, class C, class P>
struct Run {
  using Sum = typename Arithmetic<T>::type;
  static constexpr int kPositions = positions_of<T, C, P>();
  static constexpr int kOutputs = kPositions * P::kPhases;
  static constexpr int kStretch = (kPositions - 1) * P::kStep + P::kWindow;  // of the source row
  static constexpr int kVector = vector_of(kPositions * P::kStep, sizeof(T));
  static_assert(kStretch <= 64, "valid is a word of bits");

  int first_source, first_target;
  uint64_t valid;  // which columns of the stretch are inside the image

  __device__ Run(const GatherArgs& a, int tile, int lane) {
    const int position = (tile * a.column_lanes + lane) * kPositions;
    first_source = position * P::kStep + P::kFirst;
    first_target = position * P::kPhases;
    valid = 0;
#pragma unroll
    for (int c = 0; c < kStretch; ++c)
      if (static_cast<unsigned>(first_source + c) < static_cast<unsigned>(a.columns.source))
        valid |= uint64_t(1) << c;
  }
  __device__ bool empty(const GatherArgs& a) const { return first_target >= a.columns.target; }
  __device__ int column(const GatherArgs&, int i) const { return first_target + i; }

  __device__ bool inside(int c) const { return valid >> c & 1; }

  // `row` points to column 0 of the first of kSources channels.
  __device__ void load(Sum (&x)[C::kSources][kStretch], const GatherArgs& a, const T* row,
                       int sources) const {
    const int step = static_cast<int>(a.source_stride[3]);
    if constexpr (C::kSources > 1) {
#pragma unroll
      for (int c = 0; c < kStretch; ++c) {
        Sum v[C::kSources] = {};
        const T* from = row + (first_source + c) * step;
        if (inside(c)) {
          if (a.vector_source && sources == C::kSources) {
            read_vector(v, from);
          } else {
#pragma unroll
            for (int s = 0; s < C::kSources; ++s)
              if (s < sources) v[s] = read<Sum>(from + s * a.source_stride[1]);
          }
        }
#pragma unroll
        for (int s = 0; s < C::kSources; ++s) x[s][c] = v[s];
      }
    } else {
#pragma unroll
      for (int c = 0; c < kStretch; ++c) x[0][c] = 0;
#pragma unroll
      for (int c = 0; c < kStretch; ++c) {
        // Columns whose number is a multiple of kVector begin an aligned vector.
        const int in_vector = ((P::kFirst + c) % kVector + kVector) % kVector;
        const int head = c - in_vector;  // where the vector of column c begins
        const bool whole = head >= 0 && head + kVector <= kStretch && kVector > 1;
        if (whole && in_vector == 0 && a.vector_source && inside(c) && inside(c + kVector - 1)) {
          Sum v[kVector];
          read_vector(v, row + first_source + c);
#pragma unroll
          for (int i = 0; i < kVector; ++i) x[0][c + i] = v[i];
        } else if (inside(c) &&
                   !(whole && a.vector_source && inside(head) && inside(head + kVector - 1))) {
          x[0][c] = read<Sum>(row + (first_source + c) * step);
        }
      }
    }
  }

  __device__ void add(Sum (&sum)[C::kTargets][kOutputs], const GatherArgs& a, const T* row,
                      int sources, const Sum* weight, int source_weights) const {
    Sum x[C::kSources][kStretch];
    load(x, a, row, sources);
#pragma unroll
    for (int s = 0; s < (C::kPaired ? 1 : C::kSources); ++s) {
      Sum w[P::kPhases * P::kWindow][C::kTargets];
#pragma unroll
      for (int slot = 0; slot < P::kPhases * P::kWindow; ++slot)
        if (P::has(slot / P::kWindow, slot % P::kWindow))
          read_shared(w[slot], weight + s * source_weights + slot * C::kTargets);
#pragma unroll
      for (int c = 0; c < kStretch; ++c) {
        if (!inside(c)) continue;
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
          const int tap = c - i / P::kPhases * P::kStep;
          if (tap < 0 || tap >= P::kWindow || !P::has(i % P::kPhases, tap)) continue;
#pragma unroll
          for (int t = 0; t < C::kTargets; ++t)
            sum[t][i] += x[C::kPaired ? t : s][c] * w[i % P::kPhases * P::kWindow + tap][t];
        }
      }
    }
  }
};

// The same for taps known at run time: positions of one phase, column_lanes / phases apart, so that
// neighbouring lanes are neighbouring columns of the target and of the weight.
template <class T, class C>
struct Run<T, C, Unknown> {
  using Sum = typename Arithmetic<T>::type;
  static constexpr int kOutputs = positions_of<T, C, Unknown>();

  int phase, position, apart;

  __device__ Run(const GatherArgs& a, int tile, int lane) {
    phase = lane % a.columns.phases;
    apart = a.column_lanes / a.columns.phases;
    position = tile * kOutputs * apart + lane / a.columns.phases;
  }
  __device__ int column(const GatherArgs& a, int i) const {
    return (position + i * apart) * a.columns.target_step + phase;
  }
  __device__ bool empty(const GatherArgs& a) const { return column(a, 0) >= a.columns.target; }

  __device__ void add(Sum (&sum)[C::kTargets][kOutputs], const GatherArgs& a, const T* row,
                      int sources, const Sum* weight, int) const {
    const int step = static_cast<int>(a.source_stride[3]);
    for (int tap = a.columns.begin[phase]; tap < a.columns.begin[phase + 1]; ++tap) {
      Sum w[C::kTargets];
      read_shared(w, weight + a.columns.k[tap] * C::kTargets);
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int column = (position + i * apart) * a.columns.source_step + a.columns.offset[tap];
        if (static_cast<unsigned>(column) >= static_cast<unsigned>(a.columns.source)) continue;
        const T* from = row + column * step;
        Sum x[C::kSources] = {};
        if (C::kSources > 1 && a.vector_source && sources == C::kSources) {
          read_vector(x, from);
        } else {
#pragma unroll
          for (int s = 0; s < C::kSources; ++s)
            if (s < sources) x[s] = read<Sum>(from + s * a.source_stride[1]);
        }
#pragma unroll
        for (int t = 0; t < C::kTargets; ++t) sum[t][i] += x[C::kPaired ? t : 0] * w[t];
      }
    }
  }
};

// sum[t][i] to channel t, column(i) of the row that `to` points to.
template <class T, class C, class P, class Sum, int kOutputs>
__device__ void store(const GatherArgs& a, const Run<T, C, P>& run,
                      const Sum (&sum)[C::kTargets][kOutputs], T* to, int targets) {
  const int step = static_cast<int>(a.target_stride[3]);
  if constexpr (C::kUnrolled) {
    constexpr int kVector = vector_of(kOutputs, sizeof(T));
    if (a.vector_target_row && run.column(a, kOutputs - 1) < a.columns.target) {
#pragma unroll
      for (int t = 0; t < C::kTargets; ++t)
#pragma unroll
        for (int i = 0; i < kOutputs; i += kVector)
          if (t < targets)
            write_vector<kVector>(to + t * a.target_stride[1] + run.column(a, i), sum[t] + i);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int column = run.column(a, i);
    if (column >= a.columns.target) continue;
    T* at = to + column * step;
    if (C::kTargets > 1 && a.vector_target_channels && targets == C::kTargets) {
      Sum v[C::kTargets];
#pragma unroll
      for (int t = 0; t < C::kTargets; ++t) v[t] = sum[t][i];
      write_vector<C::kTargets>(at, v);
    } else {
#pragma unroll
      for (int t = 0; t < C::kTargets; ++t)
        if (t < targets) write(at + t * a.target_stride[1], sum[t][i]);
    }
  }
}

template <class T, class C, class P>
__global__ void __launch_bounds__(kThreads, 1)
    gather_direct_kernel(const __grid_constant__ GatherArgs a) {
  using Sum = typename Arithmetic<T>::type;
  Sum* s_weight = shared_memory<Sum>();

  unsigned block = blockIdx.x;
  const int column_tile = block % a.column_tiles;
  block /= a.column_tiles;
  const int row_tile = block % a.row_tiles;
  block /= a.row_tiles;
  const int first_phase = block % a.row_phase_blocks * a.row_phases;
  block /= a.row_phase_blocks;
  const int first_unit = block % a.unit_blocks * a.unit_lanes;
  const int n = block / a.unit_blocks;

  const int phases = min(a.row_phases, a.rows.phases - first_phase);
  const int first_tap = a.rows.begin[first_phase];
  const int taps = a.rows.begin[first_phase + phases] - first_tap;
  stage_weights<T, C>(a, s_weight, first_unit, first_tap, taps);
  __syncthreads();

  const int lane = threadIdx.x / a.unit_lanes, unit_lane = threadIdx.x % a.unit_lanes;
  const int row_lane = lane / a.column_lanes, unit = first_unit + unit_lane;
  const Run<T, C, P> run(a, column_tile, lane % a.column_lanes);
  const int phase = row_lane % a.row_phases;
  if (unit >= a.units || phase >= phases || run.empty(a)) return;

  // The unit's first channels, and how many it has.
  const int group = C::kPaired ? 0 : unit / a.group_units;
  const int in_group = (C::kPaired ? unit : unit % a.group_units) * C::kTargets;
  const int channel = group * a.group_targets + in_group;
  const int targets = min(C::kTargets, (C::kPaired ? a.channels : a.group_targets) - in_group);
  const T* source = static_cast<const T*>(a.source) + n * a.source_stride[0] +
                    (C::kPaired ? channel : group * a.group_sources) * a.source_stride[1];
  T* target = static_cast<T*>(a.target) + n * a.target_stride[0] + channel * a.target_stride[1];
  const int sources = C::kPaired ? C::kSources : a.group_sources;
  const int tap_weights = a.unit_lanes * a.slots * C::kTargets;

  for (int step = 0; step < a.row_steps; ++step) {
    const int position =
        (row_tile * a.row_steps + step) * (a.row_lanes / a.row_phases) + row_lane / a.row_phases;
    const int row = position * a.rows.target_step + first_phase + phase;
    if (row >= a.rows.target) return;
    Sum sum[C::kTargets][Run<T, C, P>::kOutputs];
#pragma unroll
    for (int t = 0; t < C::kTargets; ++t) {
      const Sum bias =
          a.bias && t < targets
              ? read<Sum>(static_cast<const T*>(a.bias) + (channel + t) * a.bias_stride)
              : Sum(0);
#pragma unroll
      for (int i = 0; i < Run<T, C, P>::kOutputs; ++i) sum[t][i] = bias;
    }
    for (int s = 0; s < sources; s += C::kSources) {
      const T* plane = source + s * a.source_stride[1];
      const Sum* weight = s_weight + s * taps * tap_weights + unit_lane * a.slots * C::kTargets;
      for (int tap = a.rows.begin[first_phase + phase]; tap < a.rows.begin[first_phase + phase + 1];
           ++tap) {
        const int source_row = position * a.rows.source_step + a.rows.offset[tap];
        if (static_cast<unsigned>(source_row) >= static_cast<unsigned>(a.rows.source)) continue;
        run.add(sum, a, plane + source_row * static_cast<int>(a.source_stride[2]),
                C::kPaired ? targets : C::kSources, weight + (tap - first_tap) * tap_weights,
                taps * tap_weights);
      }
    }
    if (a.activation != Activation::kNone)
      activate_all<C::kTargets * Run<T, C, P>::kOutputs>(a.activation, a.negative_slope,
                                                         &sum[0][0]);
    store<T, C, P>(a, run, sum, target + row * static_cast<int>(a.target_stride[2]), targets);
  }
}

}  // namespace direct
}  // namespace cuda
}  // namespace deconv
