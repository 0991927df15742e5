// What follows the gather product (gather_gemm.h): from the sums of a block to the target. Bias,
// activation, one rounding, phases back to their places.
#pragma once

#include "../reference/elements.h"
#include "activate.h"
#include "gather_runs.h"
#include "interleave.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S>
struct GatherStore {
  using T = typename Arithmetic<S>::type;

  const GatherPlan& plan;

  // From the sums of a chunk to the target.
  void finish(int64_t group, int64_t chunk, int64_t tiles, const PixelRun* runs, int64_t run_count,
              T* sums, T* bias, T* class_bias) const {
    repair<false>(group, chunk, runs, run_count, sums);
    activate(chunk, tiles, sums, bias, class_bias);
    store(group, chunk, runs, run_count, sums, bias);
  }

  // Zeros that stand for padding turn into NaN against infinite operands. Whatever came out as NaN,
  // or where that is no more to be trusted as infinite, is computed again from the definition.
  template <bool Infinite>
  static bool is_suspect(T sum) {
    return Infinite ? sum - sum != 0 : sum != sum;
  }
  // Whether no sum is suspect, for which all that tiles wrote is read in long lines.
  template <bool Infinite>
  bool is_clean(int64_t chunk, const PixelRun* runs, int64_t run_count, const T* sums) const {
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    bool clean = true;
    const auto look = [&](const T* line, int64_t count) {
      int broken = 0;
      for (int64_t i = 0; i < count; ++i) broken |= is_suspect<Infinite>(line[i]);
      clean &= broken == 0;
    };
    for (int64_t i = 0, end; i < run_count; i = end) {
      end = end_of_neighbours(runs, i, run_count);
      const int64_t at = runs[i].at, pixels = runs[end - 1].at + runs[end - 1].count - at;
      for (const GatherClass& g : plan.classes) {
        const int64_t written = round_up(
            rows * plan.h.classes[g.h].phases * plan.w.classes[g.w].phases, plan.row_width);
        const T* first = sums + plan.sum_at(g.first_row, at);
        if (plan.rows_across && written == plan.sum_pitch()) {
          look(first, pixels * written);
        } else {
          for (int64_t line = 0; line < (plan.rows_across ? pixels : written); ++line)
            look(first + line * plan.sum_pitch(), plan.rows_across ? written : pixels);
        }
      }
    }
    return clean;
  }
  // The end of the runs from i on whose pixels follow each other in the block.
  static int64_t end_of_neighbours(const PixelRun* runs, int64_t i, int64_t run_count) {
    do {
      ++i;
    } while (i < run_count && runs[i].at == runs[i - 1].at + runs[i - 1].count);
    return i;
  }

  template <bool Infinite>
  DECONV_PHASE void repair(int64_t group, int64_t chunk, const PixelRun* runs, int64_t run_count,
                           T* sums) const {
    if (is_clean<Infinite>(chunk, runs, run_count, sums)) return;
    Params params = plan.params;
    params.bias = nullptr;
    params.activation = Activation::kNone;
    const int64_t first = group * plan.rows + chunk * plan.row_chunk;
    for_each_place(
        chunk, runs, run_count,
        [&](int64_t row, int64_t padded_row, const PixelRun& run, int64_t i, int64_t th,
            int64_t tw) {
          T& sum = sums[plan.sum_at(padded_row, run.at + i)];
          if (!is_suspect<Infinite>(sum)) return;
          const int64_t n = plan.batch_innermost ? run.n + i : run.n;
          sum = static_cast<T>(
              plan.op == Op::kForward
                  ? reference::forward_element<double, S>(params, n, first + row, th, tw)
                  : reference::grad_input_element<double, S>(params, n, first + row, th, tw));
        });
  }

  // Calls place(row within the chunk, padded row, run, index in the run, target h, target w) for
  // every target of the block.
  template <class Place>
  void for_each_place(int64_t chunk, const PixelRun* runs, int64_t run_count,
                      const Place& place) const {
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t rh = 0; rh < h.phases; ++rh)
          for (int64_t rw = 0; rw < w.phases; ++rw)
            for (const PixelRun* run = runs; run < runs + run_count; ++run) {
              const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh;
              if (th < 0 || th >= plan.h.target) continue;
              for (int64_t i = 0; i < run->count; ++i) {
                const int64_t tw = (run->jw + (plan.batch_innermost ? 0 : i)) * plan.w.target_step +
                                   w.first_phase + rw;
                if (tw >= 0 && tw < plan.w.target)
                  place(row, g.first_row + plan.row_of(h, w, rows, row, rh, rw), *run, i, th, tw);
              }
            }
    }
  }

  // [rows of the chunk]; zeros if there is none.
  void load_bias(int64_t group, int64_t chunk, T* bias) const {
    const int64_t first = group * plan.rows + chunk * plan.row_chunk,
                  rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    const S* from = static_cast<const S*>(plan.params.bias);
    for (int64_t row = 0; row < rows; ++row)
      bias[row] = from ? convert<T>(from[(first + row) * plan.params.bias_stride]) : T(0);
  }

  // Bias and activation of a block, if there is one: one more pass over sums in the cache costs
  // less than all forms of the store for each activation. `class_bias` is the bias of the padded
  // rows of a class; of `bias` nothing is left to add.
  void activate(int64_t chunk, int64_t tiles, T* sums, T* bias, T* class_bias) const {
    if (plan.params.activation == Activation::kNone) return;
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk),
                  pixels = tiles * plan.pixel_width;
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (int64_t i = 0; i < g.padded_rows; ++i) class_bias[i] = 0;
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t rh = 0; rh < h.phases; ++rh)
          for (int64_t rw = 0; rw < w.phases; ++rw)
            class_bias[plan.row_of(h, w, rows, row, rh, rw)] = bias[row];
      const int64_t class_rows = rows * h.phases * w.phases;
      activate_lines<T>(plan.params,
                        {sums + plan.sum_at(g.first_row, 0), plan.rows_across ? pixels : class_rows,
                         plan.sum_pitch(), plan.rows_across ? class_rows : pixels, class_bias,
                         !plan.rows_across});
    }
    for (int64_t row = 0; row < rows; ++row) bias[row] = 0;
  }

  DECONV_PHASE void store(int64_t group, int64_t chunk, const PixelRun* runs, int64_t run_count,
                          const T* sums, const T* bias) const {
    const int64_t first = group * plan.rows + chunk * plan.row_chunk,
                  rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    S* target = static_cast<S*>(plan.target.data) + first * plan.target.stride[1];
    if (target_is_linear()) return store_linear(rows, runs, run_count, sums, bias, target);
    if (!plan.rows_across && !plan.batch_innermost && plan.target.stride[3] == 1)
      return store_interleaved(rows, runs, run_count, sums, bias, target);
    if (plan.rows_across && plan.rows_by_phase && plan.target.stride[3] == 1 &&
        plan.target.stride[1] != 1 && !plan.batch_innermost && plan.w.target_step <= kMostPhases)
      return store_transposed(rows, runs, run_count, sums, bias, target);
    if (plan.rows_across && plan.rows_by_phase && plan.target.stride[1] == 1)
      return store_rows(rows, runs, run_count, sums, bias, target);
    store_strided(rows, runs, run_count, sums, bias, target);
  }

  // Pixels are lanes, there is one phase and planes of the target are contiguous (grad_input in
  // NCHW): pixels that follow each other do so in the target, across the ends of its rows.
  bool target_is_linear() const {
    return !plan.rows_across && !plan.batch_innermost && plan.h.target_step == 1 &&
           plan.w.target_step == 1 && plan.target.stride[3] == 1 &&
           plan.target.stride[2] == plan.w.target && !plan.flat;
  }
  DECONV_PHASE void store_linear(int64_t rows, const PixelRun* runs, int64_t run_count,
                                 const T* sums, const T* bias, S* target) const {
    const PixelRun* next;
    for (const PixelRun* run = runs; run < runs + run_count; run = next) {
      int64_t count = run->count;
      for (next = run + 1;
           next < runs + run_count && next->n == run->n && next->at == run->at + count; ++next)
        count += next->count;
      for (int64_t row = 0; row < rows; ++row) {
        const T* from = sums + plan.sum_at(row, run->at);
        interleave_full<1>(target + plan.target.at(run->n, row, run->jh, run->jw), &from, 0, count,
                           bias[row], plan.streams);
      }
    }
  }

  // Any strides: one pass a row and phase.
  DECONV_PHASE void store_strided(int64_t rows, const PixelRun* runs, int64_t run_count,
                                  const T* sums, const T* bias, S* target) const {
    const int64_t from_step = plan.rows_across ? plan.sum_pitch() : 1;
    const int64_t to_step = plan.w.target_step * plan.target.stride[3];
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t rh = 0; rh < h.phases; ++rh)
          for (int64_t rw = 0; rw < w.phases; ++rw) {
            const T* line =
                sums + plan.sum_at(g.first_row + plan.row_of(h, w, rows, row, rh, rw), 0);
            // One position of many images: image by image, for the positions of an image share
            // cache lines.
            const int64_t images = plan.batch_innermost ? min_of(plan.pixel_width, plan.batch) : 1;
            for (int64_t image = 0; image < images; ++image)
              for (const PixelRun* run = runs; run < runs + run_count; ++run) {
                const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh;
                const int64_t tw = run->jw * plan.w.target_step + w.first_phase + rw;
                if (th < 0 || th >= plan.h.target || image >= run->count) continue;
                const Range inside = targets_inside(*run, tw);
                const T* from = line + (run->at + image + inside.begin) * from_step;
                S* to =
                    target + plan.target.at(run->n + image, row, th, tw) + inside.begin * to_step;
                for (int64_t i = inside.begin; i < inside.end;
                     ++i, from += from_step, to += to_step)
                  *to = convert<S>(*from + bias[row]);
              }
          }
    }
  }

  // Which pixels of a run, whose first target is column tw, have their target inside.
  Range targets_inside(const PixelRun& run, int64_t tw) const {
    const int64_t step = plan.w.target_step;
    if (plan.batch_innermost) return {0, tw >= 0 && tw < plan.w.target};
    const int64_t begin = tw >= 0 ? 0 : (-tw + step - 1) / step;
    const int64_t end =
        tw >= plan.w.target ? 0 : min_of(run.count, (plan.w.target - 1 - tw) / step + 1);
    return {min_of(begin, end), end};
  }

  // Pixels are lanes and the target's rows are contiguous: the phases of a row are interleaved, so
  // that whole cache lines are written.
  DECONV_PHASE void store_interleaved(int64_t rows, const PixelRun* runs, int64_t run_count,
                                      const T* sums, const T* bias, S* target) const {
    constexpr int64_t kMost = 64;  // phases handled at a time
    const int64_t step = plan.w.target_step, first_phase = plan.w.classes[0].first_phase;
    int64_t phases = 0;
    for (const PhaseClass& w : plan.w.classes) phases += w.phases;
    for (int64_t row = 0; row < rows; ++row)
      for (size_t class_h = 0; class_h < plan.h.classes.size(); ++class_h)
        for (int64_t rh = 0; rh < plan.h.classes[class_h].phases; ++rh)
          for (int64_t p0 = 0; p0 < phases; p0 += kMost) {
            const T* from[kMost];
            const int64_t width = min_of(kMost, phases - p0);
            int64_t phase = 0;
            for (size_t class_w = 0; class_w < plan.w.classes.size(); ++class_w) {
              const GatherClass& g = plan.classes[class_h * plan.w.classes.size() + class_w];
              const PhaseClass &h = plan.h.classes[class_h], &w = plan.w.classes[class_w];
              for (int64_t rw = 0; rw < w.phases; ++rw, ++phase)
                if (phase >= p0 && phase < p0 + width)
                  from[phase - p0] =
                      sums + plan.sum_at(g.first_row + plan.row_of(h, w, rows, row, rh, rw), 0);
            }
            for (const PixelRun* run = runs; run < runs + run_count; ++run) {
              const int64_t th =
                  run->jh * plan.h.target_step + plan.h.classes[class_h].first_phase + rh;
              if (th < 0 || th >= plan.h.target) continue;
              interleave(TargetRow<S>{target + plan.target.at(run->n, row, th, 0), plan.w.target,
                                      run->jw * step + first_phase + p0, step, plan.streams},
                         from, width, run->at, run->count, bias[row]);
            }
          }
  }

  static constexpr int64_t kMostPhases = 128;

  // Rows are lanes, but the target's rows of pixels are contiguous: squares of rows times targets
  // that follow each other, all phases of them, are transposed.
  DECONV_PHASE void store_transposed(int64_t rows, const PixelRun* runs, int64_t run_count,
                                     const T* sums, const T* bias, S* target) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t step = plan.w.target_step, first_phase = plan.w.classes[0].first_phase;
    for (size_t class_h = 0; class_h < plan.h.classes.size(); ++class_h) {
      const PhaseClass& h = plan.h.classes[class_h];
      for (int64_t rh = 0; rh < h.phases; ++rh) {
        const T* from[kMostPhases];
        int64_t phases = 0;
        for (size_t class_w = 0; class_w < plan.w.classes.size(); ++class_w) {
          const PhaseClass& w = plan.w.classes[class_w];
          const GatherClass& g = plan.classes[class_h * plan.w.classes.size() + class_w];
          for (int64_t rw = 0; rw < w.phases; ++rw)
            from[phases++] = sums + g.first_row + plan.row_of(h, w, rows, 0, rh, rw);
        }
        // Some rows over all pixels: what follows each other in the target does so in time.
        for (int64_t row = 0; row < rows; row += kN) {
          const Vector<T> add = load_first<T>(bias + row, min_of(kN, rows - row));
          for (const PixelRun* run = runs; run < runs + run_count; ++run) {
            const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh;
            if (th < 0 || th >= plan.h.target) continue;
            const int64_t start = run->jw * step + first_phase;
            // Phases that do not exist lie beyond the target.
            const int64_t begin = max_of<int64_t>(0, -start),
                          end = min_of(run->count * step, plan.w.target - start);
            for (int64_t at = begin; at < end; at += kN) {
              const int64_t count = min_of(kN, end - at);
              Vector<T> square[kN];
              for (int64_t i = 0, pixel = at / step, phase = at % step; i < kN; ++i) {
                square[i] =
                    i < count
                        ? load_vector(from[phase] + row + plan.sum_at(0, run->at + pixel)) + add
                        : Vector<T>{};
                if (++phase == step) {
                  phase = 0;
                  ++pixel;
                }
              }
              transpose_step<T, kN / 2>(square);
              S* to = target + plan.target.at(run->n, row, th, start + at);
              for (int64_t i = 0; i < min_of(kN, rows - row); ++i)
                store_first_as(to + i * plan.target.stride[1], square[i], count);
            }
          }
        }
      }
    }
  }

  // Rows are lanes and contiguous in the target (channels_last): one run of rows a pixel and phase.
  DECONV_PHASE void store_rows(int64_t rows, const PixelRun* runs, int64_t run_count, const T* sums,
                               const T* bias, S* target) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t rest = rows % kN, whole = rows - rest;
    const Vector<T> rest_bias = load_first<T>(bias + whole, rest);
    // From one pixel of a run to the next.
    const int64_t column_step = plan.batch_innermost ? 0 : plan.w.target_step,
                  step = plan.batch_innermost ? plan.target.stride[0]
                                              : plan.w.target_step * plan.target.stride[3];
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (const PixelRun* run = runs; run < runs + run_count; ++run)
        for (int64_t rh = 0; rh < h.phases; ++rh) {
          const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh;
          if (th < 0 || th >= plan.h.target) continue;
          int64_t column = run->jw * plan.w.target_step + w.first_phase,
                  at = plan.target.at(run->n, 0, th, column);
          const T* pixel =
              sums + plan.sum_at(g.first_row + plan.row_of(h, w, rows, 0, rh, 0), run->at);
          for (int64_t i = 0; i < run->count;
               ++i, column += column_step, at += step, pixel += plan.sum_pitch())
            for (int64_t rw = 0; rw < w.phases; ++rw) {
              if (column + rw < 0 || column + rw >= plan.w.target) continue;
              const T* from = pixel + rw * rows;
              S* __restrict to = target + at + rw * plan.target.stride[3];
              for (int64_t row = 0; row < whole; row += kN)
                store_as(to + row, load_vector(from + row) + load_vector(bias + row));
              if (rest > 0)
                store_first_as(to + whole, load_first<T>(from + whole, rest) + rest_bias, rest);
            }
        }
    }
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
