// Which pixels a block of the gather product (gather_gemm.h) has, and how its tiles meet memory.
#pragma once

#include "gather.h"
#include "microkernel.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Pixels that lie next to each other in one row of one image, or, with batch_innermost, one
// position of consecutive images.
struct PixelRun {
  int64_t at, count;  // first pixel within the block; how many
  int64_t n, jh, jw;
};

// How a tile of pixels meets memory.
struct TilePlace {
  int64_t source;  // element of its first pixel, if it is read where it is; else -1: packed
  int64_t target;  // the same of the target, if the product itself writes it; else -1: summed
  const VectorPlace* vectors;  // where phases take turns: places of its vectors, from `target` on
  bool whole;  // its pixels have a source at all offsets of the panel, be it padding
};

// T: elements of vectors.
template <class T>
struct GatherRuns {
  const GatherPlan& plan;

  // Splits the tiles [first_tile, first_tile + tiles) into runs.
  DECONV_PHASE int64_t list_runs(int64_t first_tile, int64_t tiles, PixelRun* runs) const {
    int64_t count = 0;
    const int64_t positions_w = plan.w.positions, positions = plan.h.positions * positions_w;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t index = first_tile + t;
      int64_t at = t * plan.pixel_width;
      if (plan.batch_innermost) {
        const int64_t position = index % positions, n = index / positions * plan.pixel_width;
        runs[count++] = {at, min_of(plan.pixel_width, plan.batch - n), n, position / positions_w,
                         position % positions_w};
        continue;
      }
      int64_t pixel = index * plan.pixel_width;
      const int64_t end = min_of(pixel + plan.pixel_width, plan.batch * positions);
      while (pixel < end) {
        const int64_t jw = pixel % positions_w;
        const int64_t length = min_of(end - pixel, positions_w - jw);
        runs[count++] = {at, length, pixel / positions, pixel % positions / positions_w, jw};
        at += length;
        pixel += length;
      }
    }
    return count;
  }

  // Joins runs of neighbouring tiles that go on in the same row of the same image, of those tiles
  // that `wanted` says.
  template <class Wanted>
  int64_t join_runs(const PixelRun* runs, int64_t count, const Wanted& wanted,
                    PixelRun* joined) const {
    int64_t n = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!wanted(runs[i].at / plan.pixel_width)) continue;
      PixelRun* last = n > 0 ? joined + n - 1 : nullptr;
      if (last && !plan.batch_innermost && runs[i].n == last->n && runs[i].jh == last->jh &&
          runs[i].jw == last->jw + last->count && runs[i].at == last->at + last->count) {
        last->count += runs[i].count;
      } else {
        joined[n++] = runs[i];
      }
    }
    return n;
  }

  // `vectors` is room for the places of all tiles' vectors.
  void place_tiles(const PixelRun* runs, int64_t run_count, int64_t tiles, TilePlace* places,
                   VectorPlace* vectors) const {
    const PixelRun* run = runs;
    for (int64_t t = 0; t < tiles; ++t) {
      const PixelRun* first = run;
      bool taps = true, targets = plan.target_in_place;
      for (; run < runs + run_count && run->at < (t + 1) * plan.pixel_width; ++run) {
        taps = taps && has_all_taps(*run);
        targets = targets && has_all_targets(*run);
      }
      const bool in_one = run == first + 1 && first->count == plan.pixel_width;
      TilePlace& place = places[t];
      place = {-1, -1, nullptr, false};
      if (taps && in_one && plan.source_in_place)
        place.source = plan.source.at(first->n, 0, first->jh * plan.h.source_step,
                                      first->jw * plan.w.source_step);
      if (!taps || !targets) continue;
      if (!plan.target_in_turns) {
        if (in_one) place.target = target_of(*first, 0);
      } else if (place_vectors(first, run, vectors)) {
        place.target = 0;
        place.vectors = vectors;
        vectors += plan.pixel_width / kLanes<T>;
      }
    }
  }

  int64_t target_of(const PixelRun& run, int64_t pixel) const {
    return plan.target.at(run.n, 0, run.jh * plan.h.target_step,
                          (run.jw + pixel) * plan.w.target_step);
  }

  // Of a tile that consists of the runs [run, last). False if a vector would lie in three pieces.
  bool place_vectors(const PixelRun* run, const PixelRun* last, VectorPlace* vectors) const {
    int64_t used = 0;  // pixels of the run
    for (int64_t n = 0; n < plan.pixel_width / kLanes<T>; ++n) {
      VectorPlace& v = vectors[n];
      v = {0, 0, 0, 0};
      for (int64_t left = kLanes<T>; left > 0 && run < last;) {
        const int64_t count = min_of(left, run->count - used), at = target_of(*run, used);
        if (v.head == 0) v.first = at;
        if (v.rest == 0 && at == v.first + v.head * plan.w.target_step) {
          v.head += count;
        } else if (v.rest == 0 || at == v.second + v.rest * plan.w.target_step) {
          if (v.rest == 0) v.second = at;
          v.rest += count;
        } else {
          return false;
        }
        left -= count;
        used += count;
        if (used < run->count) continue;
        ++run;
        used = 0;
      }
    }
    return true;
  }

  bool has_all_taps(const PixelRun& run) const {
    if (plan.batch_innermost || plan.offsets() == 0) return false;
    const int64_t ih = run.jh * plan.h.source_step, iw = run.jw * plan.w.source_step,
                  last_iw = iw + (run.count - 1) * plan.w.source_step;
    return ih + plan.offsets_h.front() >= plan.rows_apart &&
           ih + plan.offsets_h.back() < plan.h.source - plan.rows_apart &&
           iw + plan.offsets_w.front() >= 0 && last_iw + plan.offsets_w.back() < plan.w.source;
  }

  // For every phase.
  bool has_all_targets(const PixelRun& run) const {
    const auto inside = [](const AxisTaps& axis, int64_t first, int64_t last) {
      const PhaseClass& c = axis.classes.back();
      return first * axis.target_step + axis.classes.front().first_phase >= 0 &&
             last * axis.target_step + c.first_phase + c.phases <= axis.target;
    };
    return inside(plan.h, run.jh, run.jh) && inside(plan.w, run.jw, run.jw + run.count - 1);
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
