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
#include "interleave.h"
#include "microkernel.h"
#include "pack_row.h"
#include "profile.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// A packed row, and where the weights of its channel and kernel row are.
template <class T>
struct PackedRow {
  const T* elements;
  int64_t weights;
};

// The taps of one column phase over the packed rows that a row of the target reads.
template <class T>
struct RowSum {
  const PackedRow<T>* packed;  // [rows]
  int64_t rows;
  const T* weights;
  const int64_t* start;  // [taps] where in a packed row the tap begins
  int64_t taps;
};

// Lanes that are not zero where a sum became NaN.
template <class T>
using Broken = Vector<typename IntegerOf<sizeof(T)>::type>;

template <class T>
inline bool any_lane(const Broken<T>& lanes) {
  const Vector<int64_t> words = reinterpret_cast<Vector<int64_t>>(lanes);
  int64_t any = 0;
  for (int i = 0; i < kLanes<int64_t>; ++i) any |= words[i];
  return any != 0;
}

// sums[i] (+)= sum over rows and taps of weight * packed[row][start[tap] + i], i < Vectors * kLanes
template <int Vectors, class T>
inline void sum_row_vectors(const RowSum<T>& r, int64_t i, T* sums, bool accumulate,
                            Broken<T>& broken) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) sum[v] = Vector<T>{};
  for (const PackedRow<T>*row = r.packed, *const end = row + r.rows; row != end; ++row) {
    const T *packed = row->elements + i, *weights = r.weights + row->weights;
    for (int64_t tap = 0; tap < r.taps; ++tap) {
      const T weight = weights[tap];
      const T* source = packed + r.start[tap];
      for (int v = 0; v < Vectors; ++v) sum[v] += weight * load_vector(source + v * kN);
    }
  }
  for (int v = 0; v < Vectors; ++v) {
    if (accumulate) sum[v] += load_vector(sums + i + v * kN);
    broken |= sum[v] != sum[v];
    store_vector(sums + i + v * kN, sum[v]);
  }
}

// The same for whole vectors that cover `length` positions, in two levels, as everywhere
// (microkernel.h).
template <class T>
DECONV_PHASE void sum_rows(RowSum<T> r, int64_t length, T* sums, bool accumulate,
                           Broken<T>& all_broken) {
  constexpr int kN = kLanes<T>;
  Broken<T> broken = all_broken;
  const int64_t all = r.rows;
  const int64_t at_once = all * r.taps <= kPartialSum ? max_of<int64_t>(1, all)
                                                      : max_of<int64_t>(1, kPartialSum / r.taps);
  for (int64_t first = 0; first == 0 || first < all; first += at_once, r.packed += at_once) {
    r.rows = min_of(at_once, all - first);
    int64_t i = 0;
    for (; i + 7 * kN < length; i += 8 * kN) sum_row_vectors<8>(r, i, sums, accumulate, broken);
    for (; i + 3 * kN < length; i += 4 * kN) sum_row_vectors<4>(r, i, sums, accumulate, broken);
    for (; i < length; i += kN) sum_row_vectors<1>(r, i, sums, accumulate, broken);
    accumulate = true;
  }
  all_broken = broken;
}

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

  // sums[phase] (+)= the terms of `count` packed rows. Whether a sum became NaN.
  bool add_rows(int64_t group, int64_t row, const PackedRow<T>* packed, int64_t count,
                int64_t length, bool accumulate, const Scratch& s) const {
    const T* w = weights + (group * plan.rows + row) * plan.channels * p.h.kernel * taps;
    Broken<T> broken{};
    in_phase(Phase::kProduct, [&] {
      for (int64_t i = 0; i < phases; ++i) {
        const RowPlan::ColumnPhase& phase = plan.phases[i];
        const RowSum<T> sum{packed, count, w + phase.first_tap,
                            plan.starts.data() + phase.first_tap, phase.taps};
        sum_rows(sum, length, s.sums + i * sum_pitch(), accumulate, broken);
      }
    });
    return any_lane<T>(broken);
  }

  // Rows [t0, t1) of the target, all channels of one group.
  void rows(int64_t n, int64_t group, int64_t t0, int64_t t1) const {
    const Scratch s = carve();
    for (int64_t j0 = 0; j0 < plan.positions; j0 += plan.piece) {
      const int64_t count = min_of(plan.piece, plan.positions - j0);
      for (int64_t i = 0; plan.keep && i < plan.channels * plan.slots; ++i) s.kept[i] = kNoRow;
      AxisPosition at(plan.h, t0);
      for (int64_t t = t0; t < t1; ++t, at.next()) {
        const int64_t read = plan.keep ? keep_rows(n, group, at, j0, s) : 0;
        for (int64_t row = 0; row < plan.rows; ++row) {
          const bool broken = plan.keep ? add_rows(group, row, s.read, read, count, false, s)
                                        : sum_one_by_one(n, group, row, at, j0, count, s);
          in_phase(Phase::kStore, [&] {
            if (broken) repair(n, group * plan.rows + row, t, j0, count, s);
            store(n, group * plan.rows + row, t, j0, count, s);
          });
        }
      }
    }
  }

  // Has the rows that are read at `at` packed, and lists them.
  int64_t keep_rows(int64_t n, int64_t group, const AxisPosition& at, int64_t j0,
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
                   [&] { pack_row<S>(plan, n, group * plan.channels + c, source, j0, packed); });
        s.kept[place] = source;
        s.read[count++] = {packed, (c * p.h.kernel + tap.k) * taps};
      }
    }
    return count;
  }

  bool sum_one_by_one(int64_t n, int64_t group, int64_t row, const AxisPosition& at, int64_t j0,
                      int64_t length, const Scratch& s) const {
    bool broken = false;
    for (int64_t i = 0; i < phases * sum_pitch(); ++i) s.sums[i] = 0;
    for (int64_t c = 0; c < plan.channels; ++c)
      for (const PhaseTap& tap : at) {
        const int64_t source = at.source(tap);
        if (source < 0) continue;
        in_phase(Phase::kPack,
                 [&] { pack_row<S>(plan, n, group * plan.channels + c, source, j0, s.packed); });
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
    T bias = params.bias ? convert<T>(static_cast<const S*>(params.bias)[row * params.bias_stride])
                         : T(0);
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
