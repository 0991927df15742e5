// "direct" for grad_weight of problems with few channels a group:
//
//     dw[ci, co, kh, kw] = sum over lines (n, ih) and positions j of
//                          x[n, ci, ih, j] * packed dy row[n, co, oh][start of kw + j]
//
// Rows of dy are packed as for grad_input (row_plan.h): a tap reads a copy from a fixed place on,
// with zeros beside the row. A row of x is multiplied with many taps at a time, whose sums stay in
// registers, one vector a tap.
//
// Tasks share out lines as well as weights, so that few channels keep all threads busy; what the
// parts of the lines came to is added up in the end, in their order.
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "microkernel.h"
#include "pack_row.h"
#include "profile.h"
#include "scratch.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Units of weights (the caller's), blocks of kernel rows, parts of the lines.
struct WeightTasks {
  static constexpr int64_t kTasks = 64;           // wanted, if there are lines enough
  static constexpr int64_t kLines = 8;            // that a task has at least
  static constexpr int64_t kSums = 16 << 10;      // that a task holds at most, if one row allows it
  static constexpr int64_t kPartial = 256 << 10;  // sums that all parts leave behind
  struct Task {
    int64_t unit, row_begin, row_end, part, line_begin, line_end;
  };

  int64_t units, kernel_h, rows, blocks;  // kernel rows of a task, tasks of a unit
  int64_t lines, parts, elements;         // of dw

  // `row_sums`: what a task holds for one kernel row; `most_rows`: of a task.
  WeightTasks(const Problem& p, int64_t unit_count, int64_t row_sums, int64_t most_rows)
      : units(unit_count),
        kernel_h(p.h.kernel),
        rows(max_of<int64_t>(1, min_of(most_rows, kSums / max_of<int64_t>(1, row_sums)))),
        blocks((kernel_h + rows - 1) / rows),
        lines(p.batch * p.h.in),
        elements(p.c_in * (p.c_out / p.groups) * p.h.kernel * p.w.kernel) {
    parts = min_of((kTasks + units * blocks - 1) / (units * blocks),
                   min_of(lines / kLines, kPartial / max_of<int64_t>(1, elements)));
    parts = max_of<int64_t>(1, parts);
  }
  int64_t count() const { return units * blocks * parts; }
  int64_t bytes(int64_t element) const { return parts * elements * element + 64; }
  // Parts of one unit follow each other: they are neighbours in memory.
  Task at(int64_t task) const {
    const int64_t part = task % parts, block = task / parts % blocks;
    return {task / parts / blocks,
            block * rows,
            min_of(kernel_h, (block + 1) * rows),
            part,
            lines * part / parts,
            lines * (part + 1) / parts};
  }
};

// Adds up the parts, [part][ci][co][kh][kw], and stores. Zeros beside a row turn into NaN against
// infinite numbers; whatever came out as NaN is computed again from the definition.
template <class S, class T>
void finish_weights(const Params& params, const WeightTasks& tasks, const T* partial, int threads) {
  const Problem& p = params.problem;
  const int64_t outputs = p.c_out / p.groups, of_channel = tasks.elements / p.c_in;
  parallel_for(p.c_in, tasks.elements < kElementsForThreads ? 1 : threads, [&](int64_t ci) {
    in_phase(Phase::kStore, [&] {
      const T* from = partial + ci * of_channel;
      for (int64_t co = 0; co < outputs; ++co)
        for (int64_t kh = 0; kh < p.h.kernel; ++kh)
          for (int64_t kw = 0; kw < p.w.kernel; ++kw, ++from) {
            T sum = 0;
            for (int64_t part = 0; part < tasks.parts; ++part) sum += from[part * tasks.elements];
            if (sum != sum)
              sum =
                  static_cast<T>(reference::grad_weight_element<double, S>(params, ci, co, kh, kw));
            static_cast<S*>(params.w.data)[params.w.at(ci, co, kh, kw)] = convert<S>(sum);
          }
    });
  });
}

// Sums of many terms in two levels, as everywhere (microkernel.h): call after every row of terms;
// folds the partial sums into the totals when they have taken kPartialSum terms.
template <class T>
struct PartialSums {
  T *partial, *total;
  int64_t count, terms = 0;

  PartialSums(T* memory, int64_t size) : partial(memory), total(memory + size), count(size) {
    for (int64_t i = 0; i < 2 * count; ++i) memory[i] = 0;
  }
  void added(int64_t more) {
    terms += more;
    if (terms >= kPartialSum) fold();
  }
  void fold() {
    for (int64_t i = 0; i < count; ++i) total[i] += partial[i];
    for (int64_t i = 0; i < count; ++i) partial[i] = 0;
    terms = 0;
  }
};

// Inputs i in [begin, end) that kernel element k carries to an output inside the axis.
inline Range inputs_of(const Axis& axis, int64_t k) {
  const int64_t shift = k * axis.dilation - axis.pad;
  const int64_t begin = shift >= 0 ? 0 : (-shift + axis.stride - 1) / axis.stride;
  const int64_t end =
      axis.out - 1 - shift < 0 ? 0 : min_of(axis.in, (axis.out - 1 - shift) / axis.stride + 1);
  return {begin, max_of(begin, end)};
}

// What a kernel column does to a row: inputs [begin, end) go to the outputs from `output` on, which
// are position begin - shift of phase `phase`.
struct ColumnTap {
  int64_t begin, end, output, phase, shift;
};

inline ColumnTap column_tap(const Axis& axis, int64_t k) {
  const Range inputs = inputs_of(axis, k);
  const int64_t output = inputs.begin * axis.stride + k * axis.dilation - axis.pad;
  if (inputs.begin == inputs.end) return {0, 0, 0, 0, 0};
  return {inputs.begin, inputs.end, output, output % axis.stride,
          inputs.begin - output / axis.stride};
}

// sums[tap] += x * source of the tap, in whole vectors that cover `length` elements.
template <int Taps, class T>
inline void add_taps(const T* x, const T* const* sources, int64_t length, T* sums) {
  constexpr int kN = kLanes<T>;
  Vector<T> sum[Taps];
  const T* source[Taps];
  for (int k = 0; k < Taps; ++k) {
    sum[k] = load_vector(sums + k * kN);
    source[k] = sources[k];
  }
  for (int64_t i = 0; i < length; i += kN) {
    const Vector<T> factor = load_vector(x + i);
    for (int k = 0; k < Taps; ++k) sum[k] += factor * load_vector(source[k] + i);
  }
  for (int k = 0; k < Taps; ++k) store_vector(sums + k * kN, sum[k]);
}

template <class T>
DECONV_PHASE void add_all_taps(const T* x, const T* const* sources, int64_t taps, int64_t length,
                               T* sums) {
  int64_t k = 0;
  for (; k + 8 <= taps; k += 8) add_taps<8>(x, sources + k, length, sums + k * kLanes<T>);
  for (; k + 4 <= taps; k += 4) add_taps<4>(x, sources + k, length, sums + k * kLanes<T>);
  for (; k < taps; ++k) add_taps<1>(x, sources + k, length, sums + k * kLanes<T>);
}

template <class S>
struct DirectWeight {
  using T = typename Arithmetic<S>::type;
  static constexpr int kN = kLanes<T>;

  const Params& params;
  const KeptRowsPlan& plan;
  const WeightTasks& tasks;
  int64_t ins, outs;  // channels of x and dy in a unit
  T* partial;         // [part][ci][co][kh][kw]
  const Problem& p = params.problem;
  int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;
  int64_t taps = static_cast<int64_t>(plan.taps.size());

  struct Scratch {
    T* packed;      // [co][slot][copy][pitch], or a single row
    int64_t* kept;  // [co][slot] line of dy that lies there
    CopyRange* ranges;
    T* x;              // [ci][piece in whole vectors]
    const T** source;  // [kh][tap]
    T* sums;           // partial and total, [ci][co][kh][tap][lanes]
  };

  void run(int64_t task) const {
    const WeightTasks::Task t = tasks.at(task);
    const int64_t in_blocks = (group_in + ins - 1) / ins,
                  out_blocks = (group_out + outs - 1) / outs,
                  group = t.unit / out_blocks / in_blocks,
                  ci0 = group * group_in + t.unit / out_blocks % in_blocks * ins,
                  co0 = t.unit % out_blocks * outs;
    const int64_t ci_count = min_of(ins, (group + 1) * group_in - ci0),
                  co_count = min_of(outs, group_out - co0);
    const int64_t row_taps = (t.row_end - t.row_begin) * taps;
    const int64_t piece = min_of(plan.piece, kPartialSum * kN),
                  x_pitch = round_up<int64_t>(piece, kN), row_elements = plan.row_elements();
    const int64_t kept_rows = plan.keep ? co_count * plan.slots : 1;
    Scratch s;
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      s.packed = carver.take<T>(kept_rows * row_elements);
      s.kept = carver.take<int64_t>(kept_rows);
      s.ranges = carver.take<CopyRange>(plan.copies.size());
      s.x = carver.take<T>(ci_count * x_pitch);
      s.source = carver.take<const T*>(row_taps);
      s.sums = carver.take<T>(2 * ci_count * co_count * row_taps * kN);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    PartialSums<T> sums(s.sums, ci_count * co_count * row_taps * kN);

    for (int64_t j0 = 0; j0 < plan.positions; j0 += piece) {
      const int64_t count = min_of(piece, plan.positions - j0);
      const RowPacker<S, T> packer(plan, s.ranges, j0);
      for (int64_t i = 0; i < kept_rows; ++i) s.kept[i] = -1;
      for (int64_t line = t.line_begin; line < t.line_end; ++line) {
        const int64_t n = line / p.h.in, ih = line % p.h.in;
        in_phase(Phase::kPack, [&] {
          for (int64_t c = 0; c < ci_count; ++c)
            pack_x(n, ci0 + c, ih, j0, count, s.x + c * x_pitch);
        });
        for (int64_t co = 0; co < co_count; ++co) {
          // Kernel rows that carry this line inside are neighbours.
          int64_t first = 0, listed = 0;
          for (int64_t kh = t.row_begin; kh < t.row_end; ++kh) {
            const int64_t oh = output_index(p.h, ih, kh);
            if (oh < 0) continue;
            if (listed == 0) first = (kh - t.row_begin) * taps;
            const int64_t place = plan.keep ? co * plan.slots + plan.slot_of[oh] : 0,
                          dy_line = (n * group_out + co0 + co) * p.h.out + oh;
            T* packed = s.packed + place * row_elements;
            if (s.kept[place] != dy_line)
              in_phase(Phase::kPack,
                       [&] { packer.pack(n, group * group_out + co0 + co, oh, packed); });
            s.kept[place] = dy_line;
            for (int64_t tap = 0; tap < taps; ++tap) s.source[listed++] = packed + plan.starts[tap];
          }
          if (listed == 0) continue;
          in_phase(Phase::kProduct, [&] {
            for (int64_t c = 0; c < ci_count; ++c)
              add_all_taps(s.x + c * x_pitch, s.source, listed, count,
                           sums.partial + ((c * co_count + co) * row_taps + first) * kN);
          });
        }
        sums.added((count + kN - 1) / kN);
      }
    }
    sums.fold();
    for (int64_t c = 0; c < ci_count; ++c)
      for (int64_t co = 0; co < co_count; ++co)
        leave(sums.total + (c * co_count + co) * row_taps * kN, t,
              partial + t.part * tasks.elements +
                  ((ci0 + c) * group_out + co0 + co) * p.h.kernel * p.w.kernel);
  }

  // Positions [j0, j0 + count) of a row of x, and zeros up to the end of a vector.
  void pack_x(int64_t n, int64_t ci, int64_t ih, int64_t j0, int64_t count, T* to) const {
    const S* from = static_cast<const S*>(params.x.data) + params.x.at(n, ci, ih, j0);
    copy_strided(to, from, params.x.stride[3], count);
    for (int64_t i = count; i < round_up<int64_t>(count, kN); ++i) to[i] = 0;
  }

  // The lanes of each sum become one number of the part's [kh][kw].
  void leave(const T* sums, const WeightTasks::Task& t, T* to) const {
    for (int64_t kh = t.row_begin; kh < t.row_end; ++kh) {
      T* row = to + kh * p.w.kernel;
      for (int64_t kw = 0; kw < p.w.kernel; ++kw) row[kw] = 0;
      for (int64_t tap = 0; tap < taps; ++tap, sums += kN)
        for (int lane = 0; lane < kN; ++lane) row[plan.taps[tap].k] += sums[lane];
    }
  }
};

template <class S>
void direct_weight(const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  constexpr int64_t kN = kLanes<T>;
  const Problem& p = params.problem;
  const KeptRowsPlan plan = plan_kept_rows(params, kN);
  // As many channels in a unit as their sums allow: each has its rows packed once.
  const int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;
  const int64_t kernel_rows = plan.keep ? p.h.kernel : 1,
                channel_sums = max_of<int64_t>(1, kernel_rows * plan.taps.size() * kN);
  const auto fit = [&](int64_t most, int64_t sums) {
    return max_of<int64_t>(1, min_of(most, WeightTasks::kSums / sums));
  };
  const int64_t ins = fit(group_in, channel_sums), outs = fit(group_out, channel_sums * ins);
  const int64_t units = p.groups * ((group_in + ins - 1) / ins) * ((group_out + outs - 1) / outs);
  const WeightTasks tasks(p, units, ins * outs * channel_sums / kernel_rows, kernel_rows);
  const DirectWeight<S> kernel{params, plan, tasks,
                               ins,    outs, static_cast<T*>(call_scratch(tasks.bytes(sizeof(T))))};
  parallel_for(tasks.count(), threads, [&](int64_t task) { kernel.run(task); });
  finish_weights<S>(params, tasks, kernel.partial, threads);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
