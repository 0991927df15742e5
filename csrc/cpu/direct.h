// "direct" for forward and grad_input: sums of shifted rows, for depthwise and other problems with
// few channels a group, where a matrix product has nothing to reuse. The equation and the packed
// rows are those of row_plan.h.
//
//   for each row t of the target, in pieces of columns:
//     pack the source rows that it reads, unless the last row of the target read them too
//     for each channel of the target and column phase r:
//       sum over terms of weight * packed row, a few vectors of positions at a time in registers
//     add the bias, apply the activation, put the phases back into their places, round, store
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "activate.h"
#include "direct_row.h"
#include "interleave.h"
#include "pack_row.h"
#include "profile.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct Direct {
  using T = typename Arithmetic<S>::type;
  static constexpr int64_t kNoRow = -1;

  const Op op;
  const Params& params;
  const RowPlan& plan;
  T* weights;  // [group][row][channel][kh][tap], taps phase by phase
  const Problem& p = params.problem;
  int64_t copies = static_cast<int64_t>(plan.copies.size());
  int64_t phases = static_cast<int64_t>(plan.phases.size());
  int64_t taps = static_cast<int64_t>(plan.taps.size());
  int64_t row_elements = copies * plan.pitch;  // of one packed row

  // What a task works with.
  struct Scratch {
    T* packed;           // [channel][slot][copy][pitch]
    int64_t* kept;       // [channel][slot] the source row that lies there
    PackedRow<T>* read;  // [kernel_h][channel] those that a row of the target reads
    CopyRange* ranges;   // [copy] of a piece
    T* sums;             // [phase with taps][piece in whole vectors]
    T* zeros;            // of phases without taps
    const T** rows;      // [phase] of the interleaving
  };

  int64_t sum_pitch() const { return round_up<int64_t>(plan.piece, kLanes<T>); }

  Scratch carve() const {
    Scratch s;
    const int64_t packed_rows = plan.keep ? plan.channels * plan.slots : 1;
    const auto take = [&](void* memory) {
      Carver carver(memory);
      s.packed = carver.take<T>(packed_rows * row_elements);
      s.kept = carver.take<int64_t>(packed_rows);
      s.read = carver.take<PackedRow<T>>(plan.channels * p.h.kernel);
      s.ranges = carver.take<CopyRange>(copies);
      s.sums = carver.take<T>(phases * sum_pitch());
      s.zeros = carver.take<T>(sum_pitch());
      s.rows = carver.take<const T*>(plan.w.target_step);
      return carver.used();
    };
    take(thread_scratch(take(nullptr)));
    for (int64_t i = 0; i < sum_pitch(); ++i) s.zeros[i] = 0;
    return s;
  }

  int64_t weight_elements() const {
    return plan.groups * plan.rows * plan.channels * p.h.kernel * taps;
  }

  void pack_weights() const {
    T* to = weights;
    for (int64_t group = 0; group < plan.groups; ++group)
      for (int64_t row = 0; row < plan.rows; ++row)
        for (int64_t c = 0; c < plan.channels; ++c)
          for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
            const S* from = static_cast<const S*>(params.w.data) +
                            (op == Op::kForward ? params.w.at(group * plan.channels + c, row, kh, 0)
                                                : params.w.at(group * plan.rows + row, c, kh, 0));
            for (int64_t tap = 0; tap < taps; ++tap)
              *to++ = convert<T>(from[plan.taps[tap].k * params.w.stride[3]]);
          }
  }

  const T* weights_of(int64_t group, int64_t row) const {
    return weights + (group * plan.rows + row) * plan.channels * p.h.kernel * taps;
  }
  RowSum<T> phase_sum(int64_t i, const T* w, const PackedRow<T>* packed, int64_t count) const {
    const RowPlan::ColumnPhase& phase = plan.phases[i];
    return {packed, count, w + phase.first_tap, plan.starts.data() + phase.first_tap, phase.taps};
  }

  // Whether sums go from registers to the target: all phases have taps, few enough, and nothing but
  // a bias is added.
  static constexpr int64_t kMostStep = 4;
  bool writes_in_place() const {
    const int64_t step = plan.w.target_step;
    int64_t most_taps = 0;
    for (const RowPlan::ColumnPhase& phase : plan.phases) most_taps = max_of(most_taps, phase.taps);
    return plan.keep && phases == step && (step == 1 || step == 2 || step == kMostStep) &&
           plan.target.stride[3] == 1 && params.activation == Activation::kNone &&
           plan.channels * p.h.kernel * most_taps <= kPartialSum;
  }
  // Whether a sum became NaN.
  bool sum_in_place(int64_t n, int64_t group, int64_t row, int64_t t, int64_t j0, int64_t length,
                    const PackedRow<T>* packed, int64_t count) const {
    RowSum<T> sums[kMostStep];
    const T* w = weights_of(group, row);
    for (int64_t i = 0; i < phases; ++i) sums[i] = phase_sum(i, w, packed, count);
    const int64_t step = plan.w.target_step, first = j0 * step;
    S* to =
        static_cast<S*>(plan.target.data) + plan.target.at(n, group * plan.rows + row, t, first);
    const int64_t size = min_of(length * step, plan.w.target_size - first);
    const T bias = bias_of(group * plan.rows + row);
    return step == 1   ? sum_rows_in_place<1>(sums, to, size, bias)
           : step == 2 ? sum_rows_in_place<2>(sums, to, size, bias)
                       : sum_rows_in_place<kMostStep>(sums, to, size, bias);
  }

  // sums[phase] (+)= the terms of `count` packed rows. Whether a sum became NaN.
  bool add_rows(int64_t group, int64_t row, const PackedRow<T>* packed, int64_t count,
                int64_t length, bool accumulate, const Scratch& s) const {
    const T* w = weights_of(group, row);
    Bits<T> broken{};
    in_phase(Phase::kProduct, [&] {
      for (int64_t i = 0; i < phases; ++i) {
        sum_rows(phase_sum(i, w, packed, count), length, s.sums + i * sum_pitch(), accumulate,
                 broken);
      }
    });
    return any_lane<T>(broken);
  }

  // Rows [t0, t1) of the target, all channels of one group.
  void rows(int64_t n, int64_t group, int64_t t0, int64_t t1) const {
    const Scratch s = carve();
    const bool in_place = writes_in_place();
    for (int64_t j0 = 0; j0 < plan.positions; j0 += plan.piece) {
      const int64_t count = min_of(plan.piece, plan.positions - j0);
      const RowPacker<S, T> packer(plan, s.ranges, j0);
      for (int64_t i = 0; plan.keep && i < plan.channels * plan.slots; ++i) s.kept[i] = kNoRow;
      AxisPosition at(plan.h, t0);
      for (int64_t t = t0; t < t1; ++t, at.next()) {
        const int64_t read = plan.keep ? keep_rows(n, group, at, packer, s) : 0;
        for (int64_t row = 0; row < plan.rows; ++row) {
          bool done = false;
          if (in_place)
            in_phase(Phase::kProduct,
                     [&] { done = !sum_in_place(n, group, row, t, j0, count, s.read, read); });
          if (done) continue;
          const bool broken = plan.keep ? add_rows(group, row, s.read, read, count, false, s)
                                        : sum_one_by_one(n, group, row, at, count, packer, s);
          in_phase(Phase::kStore, [&] {
            if (broken) repair(n, group * plan.rows + row, t, j0, count, s);
            store(n, group * plan.rows + row, t, j0, count, s);
          });
        }
      }
    }
  }

  // Has the rows that are read at `at` packed, and lists them.
  int64_t keep_rows(int64_t n, int64_t group, const AxisPosition& at, const RowPacker<S, T>& packer,
                    const Scratch& s) const {
    int64_t count = 0;
    for (const PhaseTap& tap : at) {
      const int64_t source = at.source(tap);
      if (source < 0) continue;
      const int64_t slot = plan.slot_of[source];
      for (int64_t c = 0; c < plan.channels; ++c) {
        const int64_t place = c * plan.slots + slot;
        T* packed = s.packed + place * row_elements;
        if (s.kept[place] != source)
          in_phase(Phase::kPack,
                   [&] { packer.pack(n, group * plan.channels + c, source, packed); });
        s.kept[place] = source;
        s.read[count++] = {packed, (c * p.h.kernel + tap.k) * taps};
      }
    }
    return count;
  }

  bool sum_one_by_one(int64_t n, int64_t group, int64_t row, const AxisPosition& at, int64_t length,
                      const RowPacker<S, T>& packer, const Scratch& s) const {
    bool broken = false;
    for (int64_t i = 0; i < phases * sum_pitch(); ++i) s.sums[i] = 0;
    for (int64_t c = 0; c < plan.channels; ++c)
      for (const PhaseTap& tap : at) {
        const int64_t source = at.source(tap);
        if (source < 0) continue;
        in_phase(Phase::kPack,
                 [&] { packer.pack(n, group * plan.channels + c, source, s.packed); });
        const PackedRow<T> packed{s.packed, (c * p.h.kernel + tap.k) * taps};
        broken |= add_rows(group, row, &packed, 1, length, true, s);
      }
    return broken;
  }

  // Zeros that stand for padding turn into NaN against infinite weights. Whatever came out as NaN
  // is computed again from the definition.
  void repair(int64_t n, int64_t row, int64_t t, int64_t j0, int64_t count,
              const Scratch& s) const {
    for (int64_t i = 0; i < phases; ++i) {
      T* sums = s.sums + i * sum_pitch();
      Params plain = params;
      plain.bias = nullptr;
      plain.activation = Activation::kNone;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t column = (j0 + j) * plan.w.target_step + plan.phases[i].phase;
        if (sums[j] == sums[j] || column >= plan.w.target_size) continue;
        sums[j] = static_cast<T>(
            op == Op::kForward
                ? reference::forward_element<double, S>(plain, n, row, t, column)
                : reference::grad_input_element<double, S>(plain, n, row, t, column));
      }
    }
  }

  T bias_of(int64_t row) const {
    return params.bias ? convert<T>(static_cast<const S*>(params.bias)[row * params.bias_stride])
                       : T(0);
  }

  // Bias and activation, of phases without taps too.
  void activate_phases(int64_t count, T bias, const Scratch& s) const {
    for (int64_t i = 0; i < phases; ++i)
      activate_lines<T>(params, {s.sums + i * sum_pitch(), 1, 0, count, &bias, true});
    if (phases == min_of(plan.w.target_step, plan.w.target_size)) return;
    for (int64_t j = 0; j < count; ++j) s.zeros[j] = 0;
    activate_lines<T>(params, {s.zeros, 1, 0, count, &bias, true});
  }

  void store(int64_t n, int64_t row, int64_t t, int64_t j0, int64_t count, const Scratch& s) const {
    const int64_t all = min_of(plan.w.target_step, plan.w.target_size);
    for (int64_t r = 0; r < all; ++r) s.rows[r] = s.zeros;
    for (int64_t i = 0; i < phases; ++i) s.rows[plan.phases[i].phase] = s.sums + i * sum_pitch();
    T bias = bias_of(row);
    if (params.activation != Activation::kNone) {
      activate_phases(count, bias, s);
      bias = 0;
    }
    S* target = static_cast<S*>(plan.target.data) + plan.target.at(n, row, t, 0);
    if (plan.target.stride[3] == 1)
      return interleave(target, j0 * plan.w.target_step, plan.w.target_step, plan.w.target_size,
                        s.rows, all, 0, count, bias);
    for (int64_t r = 0; r < all; ++r)
      for (int64_t j = 0; j < count && (j0 + j) * plan.w.target_step + r < plan.w.target_size; ++j)
        target[((j0 + j) * plan.w.target_step + r) * plan.target.stride[3]] =
            convert<S>(s.rows[r][j] + bias);
  }
};

template <class S>
void direct(Op op, const Params& params, int threads) {
  const RowPlan plan = plan_rows(op, params, kLanes<typename Arithmetic<S>::type>);
  Direct<S> kernel{op, params, plan, nullptr};
  kernel.weights = static_cast<typename Direct<S>::T*>(
      call_scratch(kernel.weight_elements() * sizeof(typename Direct<S>::T)));
  kernel.pack_weights();
  // A task is some rows of all planes of a group: enough to read packed rows again, not so many
  // that threads go without.
  const int64_t planes = params.problem.batch * plan.groups;
  const int64_t most = (plan.h.target_size * planes + 4 * threads - 1) / (4 * threads);
  const int64_t each = max_of<int64_t>(1, min_of<int64_t>(32, most));
  const int64_t parts = (plan.h.target_size + each - 1) / each;
  parallel_for(planes * parts, threads, [&](int64_t task) {
    const int64_t plane = task / parts, first = task % parts * each;
    kernel.rows(plane / plan.groups, plane % plan.groups, first,
                min_of(first + each, plan.h.target_size));
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
