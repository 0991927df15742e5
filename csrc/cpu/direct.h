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
#include "profile.h"
#include "row_plan.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// The taps of one column phase over the packed rows that a row of the target reads.
template <class T>
struct RowSum {
  const T* const* packed;  // [rows], or null where the row lies outside the source
  int64_t rows;
  const T* weights;  // of the first row; those of the next are `weight_step` further
  int64_t weight_step;
  const int64_t* start;  // [taps] where in a packed row the tap begins
  int64_t taps;
};

// sums[i] (+)= sum over rows and taps of weight * packed[row][start[tap] + i], i < Vectors *
// kLanes; in two levels, as everywhere (microkernel.h).
template <int Vectors, class T>
inline void sum_row_vectors(const RowSum<T>& r, int64_t i, T* sums, bool accumulate) {
  constexpr int kN = kLanes<T>;
  Vector<T> total[Vectors], partial[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    total[v] = accumulate ? load_vector(sums + i + v * kN) : Vector<T>{};
    partial[v] = Vector<T>{};
  }
  int64_t terms = 0;
  const T* weights = r.weights;
  for (int64_t row = 0; row < r.rows; ++row, weights += r.weight_step) {
    if (!r.packed[row]) continue;
    const T* packed = r.packed[row] + i;
    for (int64_t tap = 0; tap < r.taps; ++tap) {
      const T weight = weights[tap];
      const T* source = packed + r.start[tap];
      for (int v = 0; v < Vectors; ++v) partial[v] += weight * load_vector(source + v * kN);
    }
    terms += r.taps;
    if (terms < kPartialSum) continue;
    terms = 0;
    for (int v = 0; v < Vectors; ++v) {
      total[v] += partial[v];
      partial[v] = Vector<T>{};
    }
  }
  for (int v = 0; v < Vectors; ++v) store_vector(sums + i + v * kN, total[v] + partial[v]);
}

// The same for whole vectors that cover `length` positions.
template <class T>
DECONV_PHASE void sum_rows(const RowSum<T>& r, int64_t length, T* sums, bool accumulate) {
  constexpr int kN = kLanes<T>;
  int64_t i = 0;
  for (; i + 3 * kN < length; i += 4 * kN) sum_row_vectors<4>(r, i, sums, accumulate);
  for (; i < length; i += kN) sum_row_vectors<1>(r, i, sums, accumulate);
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
    T* packed;         // [channel][slot][copy][pitch]
    int64_t* kept;     // [channel][slot] the source row that lies there
    const T** row_of;  // [channel][kh] packed, or null where the row has no such tap
    T* sums;           // [phase with taps][piece in whole vectors]
    T* zeros;          // of phases without taps
    const T** rows;    // [phase] of the interleaving
  };

  int64_t sum_pitch() const { return round_up<int64_t>(plan.piece, kLanes<T>); }

  Scratch carve() const {
    Scratch s;
    const int64_t packed_rows = plan.keep ? plan.channels * plan.slots : 1;
    const auto take = [&](void* memory) {
      Carver carver(memory);
      s.packed = carver.take<T>(packed_rows * row_elements);
      s.kept = carver.take<int64_t>(packed_rows);
      s.row_of = carver.take<const T*>(plan.channels * p.h.kernel);
      s.sums = carver.take<T>(phases * sum_pitch());
      s.zeros = carver.take<T>(sum_pitch());
      s.rows = carver.take<const T*>(plan.target_step);
      return carver.used();
    };
    take(thread_scratch(take(nullptr)));
    for (int64_t i = 0; i < sum_pitch(); ++i) s.zeros[i] = 0;
    return s;
  }

  // The source row that kernel row kh carries to row t of the target, or -1.
  int64_t source_row(int64_t t, int64_t kh) const {
    return op == Op::kForward ? input_index(p.h, t, kh) : output_index(p.h, t, kh);
  }

  // All copies of one row, for positions from j0 on; zeros stand where the row ends.
  DECONV_PHASE void pack_row(int64_t n, int64_t channel, int64_t row, int64_t j0, T* to) const {
    const S* source = static_cast<const S*>(plan.source.data) + plan.source.at(n, channel, row, 0);
    const int64_t step = plan.source_step, size = plan.source_size;
    for (const RowPlan::Copy& copy : plan.copies) {
      const int64_t first = (j0 + copy.base) * step + copy.residue;
      const int64_t before = first < 0 ? (-first + step - 1) / step : 0;
      const int64_t inside = size > first ? (size - first + step - 1) / step : 0;
      const int64_t end = min_of(plan.pitch, inside), begin = min_of(before, end);
      for (int64_t i = 0; i < begin; ++i) to[i] = 0;
      if (begin < end)
        copy_strided(to + begin, source + (first + begin * step) * plan.source.stride[3],
                     step * plan.source.stride[3], end - begin);
      for (int64_t i = end; i < plan.pitch; ++i) to[i] = 0;
      to += plan.pitch;
    }
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

  // sums[phase] (+)= the terms of `rows` packed rows, which stand for (channel, kh) from
  // `first_row` on
  void add_rows(int64_t group, int64_t row, const T* const* packed, int64_t first_row, int64_t rows,
                int64_t count, bool accumulate, const Scratch& s) const {
    const T* w =
        weights + ((group * plan.rows + row) * plan.channels * p.h.kernel + first_row) * taps;
    in_phase(Phase::kProduct, [&] {
      for (int64_t i = 0; i < phases; ++i) {
        const RowPlan::ColumnPhase& phase = plan.phases[i];
        const RowSum<T> sum{
            packed,    rows, w + phase.first_tap, taps, plan.starts.data() + phase.first_tap,
            phase.taps};
        sum_rows(sum, count, s.sums + i * sum_pitch(), accumulate);
      }
    });
  }

  // Rows [t0, t1) of the target, all channels of one group.
  void rows(int64_t n, int64_t group, int64_t t0, int64_t t1) const {
    const Scratch s = carve();
    for (int64_t j0 = 0; j0 < plan.positions; j0 += plan.piece) {
      const int64_t count = min_of(plan.piece, plan.positions - j0);
      for (int64_t i = 0; plan.keep && i < plan.channels * plan.slots; ++i) s.kept[i] = kNoRow;
      for (int64_t t = t0; t < t1; ++t) {
        for (int64_t kh = 0; plan.keep && kh < p.h.kernel; ++kh) {
          const int64_t source = source_row(t, kh), slot = source % plan.slots;
          for (int64_t c = 0; c < plan.channels; ++c)
            s.row_of[c * p.h.kernel + kh] =
                source < 0 ? nullptr : kept_row(n, group, c, source, slot, j0, s);
        }
        for (int64_t row = 0; row < plan.rows; ++row) {
          if (plan.keep) {
            add_rows(group, row, s.row_of, 0, plan.channels * p.h.kernel, count, false, s);
          } else {
            sum_one_by_one(n, group, row, t, j0, count, s);
          }
          in_phase(Phase::kStore, [&] {
            repair(n, group * plan.rows + row, t, j0, count, s);
            store(n, group * plan.rows + row, t, j0, count, s);
          });
        }
      }
    }
  }

  const T* kept_row(int64_t n, int64_t group, int64_t c, int64_t source, int64_t slot, int64_t j0,
                    const Scratch& s) const {
    const int64_t place = c * plan.slots + slot;
    T* packed = s.packed + place * row_elements;
    if (s.kept[place] != source)
      in_phase(Phase::kPack, [&] { pack_row(n, group * plan.channels + c, source, j0, packed); });
    s.kept[place] = source;
    return packed;
  }

  void sum_one_by_one(int64_t n, int64_t group, int64_t row, int64_t t, int64_t j0, int64_t count,
                      const Scratch& s) const {
    for (int64_t i = 0; i < phases * sum_pitch(); ++i) s.sums[i] = 0;
    for (int64_t c = 0; c < plan.channels; ++c)
      for (int64_t kh = 0; kh < p.h.kernel; ++kh) {
        const int64_t source = source_row(t, kh);
        if (source < 0) continue;
        in_phase(Phase::kPack,
                 [&] { pack_row(n, group * plan.channels + c, source, j0, s.packed); });
        add_rows(group, row, &s.packed, c * p.h.kernel + kh, 1, count, true, s);
      }
  }

  // Zeros that stand for padding turn into NaN against infinite weights. Whatever came out as NaN
  // is computed again from the definition.
  void repair(int64_t n, int64_t row, int64_t t, int64_t j0, int64_t count,
              const Scratch& s) const {
    for (int64_t i = 0; i < phases; ++i) {
      T* sums = s.sums + i * sum_pitch();
      int broken = 0;
      for (int64_t j = 0; j < count; ++j) broken |= sums[j] != sums[j];
      if (!broken) continue;
      Params plain = params;
      plain.bias = nullptr;
      plain.activation = Activation::kNone;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t column = (j0 + j) * plan.target_step + plan.phases[i].phase;
        if (sums[j] == sums[j] || column >= plan.target_size) continue;
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
    if (phases == min_of(plan.target_step, plan.target_size)) return;
    for (int64_t j = 0; j < count; ++j) s.zeros[j] = 0;
    activate_lines<T>(params, {s.zeros, 1, 0, count, &bias, true});
  }

  void store(int64_t n, int64_t row, int64_t t, int64_t j0, int64_t count, const Scratch& s) const {
    const int64_t all = min_of(plan.target_step, plan.target_size);
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
      return interleave(target, j0 * plan.target_step, plan.target_step, plan.target_size, s.rows,
                        all, 0, count, bias);
    for (int64_t r = 0; r < all; ++r)
      for (int64_t j = 0; j < count && (j0 + j) * plan.target_step + r < plan.target_size; ++j)
        target[((j0 + j) * plan.target_step + r) * plan.target.stride[3]] =
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
  const int64_t most = (plan.row_count * planes + 4 * threads - 1) / (4 * threads);
  const int64_t each = max_of<int64_t>(1, min_of<int64_t>(32, most));
  const int64_t parts = (plan.row_count + each - 1) / each;
  parallel_for(planes * parts, threads, [&](int64_t task) {
    const int64_t plane = task / parts, first = task % parts * each;
    kernel.rows(plane / plan.groups, plane % plan.groups, first,
                min_of(first + each, plan.row_count));
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
