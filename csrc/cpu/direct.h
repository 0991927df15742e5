// "direct" for forward and grad_input: sums of shifted rows, for depthwise and other problems with
// few channels a group, where a matrix product has nothing to reuse. The equation and the packed
// rows are those of row_plan.h.
//
//   for each block of rows of the target, in pieces of columns:
//     pack the source rows that they read
//     for each channel of the target (or some that share loads), row t and column phase r:
//       sum over terms of weight * packed row, a few vectors of positions at a time in registers
//     add the bias, apply the activation, put the phases back into their places, round, store
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "activate.h"
#include "direct_row.h"
#include "interleave.h"
#include "output_pool.h"
#include "pack_row.h"
#include "profile.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct Direct {
  using T = typename Arithmetic<S>::type;

  const Op op;
  const Params& params;
  const ImagePlan& plan;
  T* weights;  // [group][row][term]
  const Problem& p = params.problem;
  int64_t phases = static_cast<int64_t>(plan.phases.size());
  int64_t row_elements = plan.row_elements();
  int64_t pitch = plan.h.source_step * row_elements;  // from one position along h to the next
  bool in_place = writes_in_place();
  bool streams = outgrows_caches(result_elements(op, p) * static_cast<int64_t>(sizeof(S)));

  // What a task works with.
  struct Scratch {
    T* packed;          // [channel][image row][copy][pitch], or a single row
    CopyRange* ranges;  // [copy] of a piece
    T* sums;            // [phase with taps][piece in whole vectors]
    T* zeros;           // of phases without taps
    const T** rows;     // [phase] of the interleaving
  };

  int64_t sum_pitch() const { return round_up<int64_t>(plan.piece, kLanes<T>); }

  Scratch carve() const {
    Scratch s;
    const auto take = [&](void* memory) {
      Carver carver(memory);
      s.packed = carver.take<T>((plan.keep ? plan.channels * plan.image_rows : 1) * row_elements);
      s.ranges = carver.take<CopyRange>(plan.copies.size());
      s.sums = carver.take<T>(phases * sum_pitch());
      s.zeros = carver.take<T>(sum_pitch());
      s.rows = carver.take<const T*>(plan.w.target_step);
      return carver.used();
    };
    take(thread_scratch(take(nullptr)));
    clear(s.zeros, sum_pitch());
    return s;
  }

  int64_t weight_elements() const { return plan.groups * plan.rows * plan.all_terms(); }

  void pack_weights(int threads) const {
    const bool forward = op == Op::kForward;
    std::vector<int64_t> from;  // elements from a plane's first weight to that of a term
    from.reserve(plan.all_terms());
    plan.for_each_term([&](int64_t c, int64_t th, int64_t tw) {
      const int64_t kh = plan.h.taps[th].k, kw = plan.taps[tw].k;
      from.push_back(forward ? params.w.at(c, 0, kh, kw) : params.w.at(0, c, kh, kw));
    });
    const int most = weight_elements() < kElementsForThreads ? 1 : threads;
    parallel_for(plan.groups * plan.rows, most, [&](int64_t i) {
      in_phase(Phase::kWeights, [&] {
        const int64_t group = i / plan.rows, row = i % plan.rows;
        const S* plane = static_cast<const S*>(params.w.data) +
                         (forward ? params.w.at(group * plan.channels, row, 0, 0)
                                  : params.w.at(group * plan.rows + row, 0, 0, 0));
        T* to = weights + i * plan.all_terms();
        for (const int64_t at : from) *to++ = convert<T>(plane[at]);
      });
    });
  }

  const T* weights_of(int64_t group, int64_t row) const {
    return weights + (group * plan.rows + row) * plan.all_terms();
  }
  // Of all channels, for a row of the target with this phase; rows are kept.
  Terms<T> terms(int64_t group, int64_t row, int64_t h_phase, int64_t i) const {
    const RowPlan::ColumnPhase& phase = plan.phases[i];
    const int64_t first = plan.first_term(h_phase, phase);
    return {weights_of(group, row) + first, plan.places.data() + first, plan.terms(h_phase, phase),
            plan.all_terms()};
  }

  // Whether sums go from registers to the target: all phases have taps, and an activation finds
  // there what has not been rounded.
  static constexpr int64_t kMostStep = 4;
  static constexpr int kPlanes = 4;  // that are summed together
  bool writes_in_place() const {
    const int64_t step = plan.w.target_step;
    return plan.keep && phases == step && (step == 1 || step == 2 || step == kMostStep) &&
           plan.target.stride[3] == 1 &&
           (params.activation == Activation::kNone || std::is_same<S, T>::value);
  }

  // The rows of a group at positions [h0, h1).
  void rows(int64_t n, int64_t group, int64_t h0, int64_t h1) const {
    const Scratch s = carve();
    for (int64_t j0 = 0; j0 < plan.positions; j0 += plan.piece) {
      const int64_t count = min_of(plan.piece, plan.positions - j0);
      const RowPacker<S, T> packer(plan, s.ranges, j0);
      if (plan.keep) in_phase(Phase::kPack, [&] { pack_image(n, group, h0, h1, packer, s); });
      for (int64_t row = 0, some; row < plan.rows; row += some) {
        some = in_place && row + kPlanes <= plan.rows ? kPlanes : 1;
        bool done = false;
        if (in_place)
          in_phase(Phase::kProduct, [&] {
            done = !(some == 1 ? sum_block_in_place<1>(n, group, row, h0, h1, j0, count, s)
                               : sum_block_in_place<kPlanes>(n, group, row, h0, h1, j0, count, s));
          });
        if (!done)
          for (int64_t i = 0; i < some; ++i)
            sum_block(n, group, row + i, h0, h1, j0, count, packer, s);
      }
    }
    if (streams) end_streams();
  }

  void pack_image(int64_t n, int64_t group, int64_t h0, int64_t h1, const RowPacker<S, T>& packer,
                  const Scratch& s) const {
    const int64_t first = h0 * plan.h.source_step + plan.first_offset,
                  count = plan.image_rows - (plan.rows_at_once - (h1 - h0)) * plan.h.source_step;
    for (int64_t c = 0; c < plan.channels; ++c)
      for (int64_t i = 0; i < count; ++i) {
        T* to = s.packed + (c * plan.image_rows + i) * row_elements;
        if (first + i < 0 || first + i >= plan.h.source_size) {
          clear(to, row_elements);
        } else {
          packer.pack(n, group * plan.channels + c, first + i, to);
        }
      }
  }

  // Of channels [row, row + Planes). Whether a sum became NaN.
  template <int Planes>
  bool sum_block_in_place(int64_t n, int64_t group, int64_t row, int64_t h0, int64_t h1, int64_t j0,
                          int64_t count, const Scratch& s) const {
    const int64_t step_h = plan.h.target_step, step = plan.w.target_step;
    const int64_t first = j0 * step, size = min_of(count * step, plan.w.target_size - first);
    T bias[Planes];
    for (int i = 0; i < Planes; ++i) bias[i] = bias_of(group * plan.rows + row + i);
    bool broken = false;
    for (int64_t r = 0; r < plan.h_phases(); ++r) {
      const int64_t t = h0 * step_h + r;
      Terms<T> of_phase[kMostStep];
      for (int64_t i = 0; i < step; ++i) of_phase[i] = terms(group, row, r, i);
      const EqualRows<S, T> equal{
          ceil_div(min_of(h1 * step_h, plan.h.target_size) - t, step_h),
          s.packed,
          pitch,
          static_cast<S*>(plan.target.data) + plan.target.at(n, group * plan.rows + row, t, first),
          step_h * plan.target.stride[2],
          plan.target.stride[1],
          size,
          bias,
          streams && params.activation == Activation::kNone};
      broken |= step == 1   ? sum_rows_in_place<1, Planes>(of_phase, equal)
                : step == 2 ? sum_rows_in_place<2, Planes>(of_phase, equal)
                            : sum_rows_in_place<kMostStep, Planes>(of_phase, equal);
      if constexpr (std::is_same<S, T>::value)
        for (int i = 0; i < Planes; ++i)
          activate_lines<T>(params, {equal.to + i * equal.plane_pitch, equal.count, equal.to_pitch,
                                     size, nullptr, false});
    }
    return broken;
  }

  void sum_block(int64_t n, int64_t group, int64_t row, int64_t h0, int64_t h1, int64_t j0,
                 int64_t count, const RowPacker<S, T>& packer, const Scratch& s) const {
    const int64_t t0 = h0 * plan.h.target_step,
                  t1 = min_of(h1 * plan.h.target_step, plan.h.target_size);
    AxisPosition at(plan.h, t0);
    for (int64_t t = t0; t < t1; ++t, at.next()) {
      Bits<T> broken{};
      if (plan.keep) {
        in_phase(Phase::kProduct, [&] {
          for (int64_t i = 0; i < phases; ++i)
            sum_rows(terms(group, row, at.r, i), s.packed + (at.j - h0) * pitch, count,
                     s.sums + i * sum_pitch(), false, broken);
        });
      } else {
        sum_one_by_one(n, group, row, at, count, packer, s, broken);
      }
      in_phase(Phase::kStore, [&] {
        if (any_lane<T>(broken)) repair(n, group * plan.rows + row, t, j0, count, s);
        store(n, group * plan.rows + row, t, j0, count, s);
      });
    }
  }

  void sum_one_by_one(int64_t n, int64_t group, int64_t row, const AxisPosition& at, int64_t count,
                      const RowPacker<S, T>& packer, const Scratch& s, Bits<T>& broken) const {
    clear(s.sums, phases * sum_pitch());
    for (int64_t c = 0; c < plan.channels; ++c)
      for (const PhaseTap& tap : at) {
        const int64_t source = at.source(tap);
        if (source < 0) continue;
        in_phase(Phase::kPack,
                 [&] { packer.pack(n, group * plan.channels + c, source, s.packed); });
        in_phase(Phase::kProduct, [&] {
          for (int64_t i = 0; i < phases; ++i) {
            const RowPlan::ColumnPhase& phase = plan.phases[i];
            const T* weight = weights_of(group, row) + plan.first_term(at.r, phase) +
                              (c * plan.h_taps(at.r) + (&tap - at.begin())) * phase.taps;
            sum_rows(Terms<T>{weight, plan.starts.data() + phase.first_tap, phase.taps, 0},
                     s.packed, count, s.sums + i * sum_pitch(), true, broken);
          }
        });
      }
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
      return interleave(TargetRow<S>{target, plan.w.target_size, j0 * plan.w.target_step,
                                     plan.w.target_step, streams},
                        s.rows, all, 0, count, bias);
    for (int64_t r = 0; r < all; ++r)
      for (int64_t j = 0; j < count && (j0 + j) * plan.w.target_step + r < plan.w.target_size; ++j)
        target[((j0 + j) * plan.w.target_step + r) * plan.target.stride[3]] =
            convert<S>(s.rows[r][j] + bias);
  }
};

template <class S>
void direct(Op op, const Params& params, int threads) {
  const ImagePlan plan = plan_image(op, params, kLanes<typename Arithmetic<S>::type>);
  Direct<S> kernel{op, params, plan, nullptr};
  kernel.weights = static_cast<typename Direct<S>::T*>(
      call_scratch(kernel.weight_elements() * sizeof(typename Direct<S>::T)));
  kernel.pack_weights(threads);
  // A task is some rows of all planes of a group: enough to read packed rows again, not so many
  // that threads go without.
  const int64_t planes = params.problem.batch * plan.groups, all = plan.h_positions();
  const int64_t each = min_of(plan.rows_at_once, rows_of_a_task(all, planes, threads));
  const int64_t parts = ceil_div(all, each);
  parallel_for(planes * parts, threads, [&](int64_t task) {
    const int64_t plane = task / parts, first = task % parts * each;
    kernel.rows(plane / plan.groups, plane % plan.groups, first, min_of(first + each, all));
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
