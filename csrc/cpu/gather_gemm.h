// "gemm": forward and grad_input as a blocked matrix product over a gather plan (gather.h).
//
//   pack the weights, all threads:          [group][chunk of rows][block of channels][class][tile of rows][tap][channel][row_width]
//   for each block of pixels (and chunk of rows), in parallel:
//     for each block of channels and offsets:
//       pack the pixels:                    [tile of pixels][offset][channel][lanes]  or  [pixel][offset][channel]
//       for each class, tile of rows, tile of pixels: multiply_tile over the class's taps; taps that no pixel of the tile has are skipped
//     add the bias, put the phases back into their places, round, store
//
// The vector side of the tile is pixels or rows (plan.rows_across): what is contiguous in the target. Scratch per thread is the panel and the sums of
// one block, bounded by constants in gather.cpp; no column buffer.
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "gather.h"
#include "microkernel.h"
#include "scratch.h"
#include "interleave.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Pixels that lie next to each other in one row of one image, or, with batch_innermost, one position of consecutive images.
struct PixelRun {
  int64_t at, count;  // first pixel within the block; how many
  int64_t n, jh, jw;
};

template <class S>
struct GatherGemm {
  using T = typename Arithmetic<S>::type;

  const GatherPlan& plan;
  const Tile<T>& tile;
  T* weights;  // packed

  // -------------------------------------------------------------------------------------------------------------------------
  // Weights

  static constexpr int64_t kScatter = 512;  // kernel elements handled at a time: as many places are written to in turn

  // Packs the channels [c0, c0 + channels) of one chunk. The source is read in its own order, one channel after the other: every kernel
  // element has one place in the packed panel.
  DECONV_PHASE void pack_weights(int64_t group, int64_t chunk, int64_t c0, int64_t channels) const {
    const int64_t first = chunk * plan.row_chunk, rows = min_of(plan.row_chunk, plan.rows - first);
    T* panel = weights + ((group * plan.row_chunks + chunk) * plan.channels + c0) * plan.weights_per_channel;
    if (plan.padded_weights || rows < plan.row_chunk) clear(panel, channels * plan.weights_per_channel);
    const S* source = static_cast<const S*>(plan.weight.data) + group * plan.weight.group + c0 * plan.weight.channel + first * plan.weight.row;

    int64_t from[kScatter], to[kScatter];
    int64_t count = 0;
    const auto flush = [&] {
      for (int64_t c = 0; c < channels; ++c) {
        const S* x = source + c * plan.weight.channel;
        T* y = panel + c * plan.row_width;
        for (int64_t i = 0; i < count; ++i) y[to[i]] = convert<T>(x[from[i]]);
      }
      count = 0;
    };
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      const int64_t taps_h = h.offsets.size(), taps_w = w.offsets.size();
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t rh = 0; rh < h.phases; ++rh)
          for (int64_t rw = 0; rw < w.phases; ++rw) {
            const int64_t local = row_of(h, w, rows, row, rh, rw);
            const int64_t base = channels * (g.first_weight + local / plan.row_width * plan.row_width * g.taps) + local % plan.row_width;
            for (int64_t th = 0; th < taps_h; ++th)
              for (int64_t tw = 0; tw < taps_w; ++tw) {
                const int64_t kh = h.k[rh * taps_h + th], kw = w.k[rw * taps_w + tw];
                if (kh < 0 || kw < 0) continue;
                from[count] = row * plan.weight.row + kh * plan.weight.kernel_h + kw * plan.weight.kernel_w;
                to[count] = base + (th * taps_w + tw) * channels * plan.row_width;
                if (++count == kScatter) flush();
              }
          }
    }
    flush();
  }

  // Where (row, phase) stands among the rows of its class.
  int64_t row_of(const PhaseClass& h, const PhaseClass& w, int64_t rows, int64_t row, int64_t rh, int64_t rw) const {
    return plan.rows_by_phase ? (rh * w.phases + rw) * rows + row : (row * h.phases + rh) * w.phases + rw;
  }

  // -------------------------------------------------------------------------------------------------------------------------
  // Pixels

  // Splits the tiles [first_tile, first_tile + tiles) into runs.
  DECONV_PHASE int64_t list_runs(int64_t first_tile, int64_t tiles, PixelRun* runs) const {
    int64_t count = 0;
    const int64_t positions_w = plan.w.positions, positions = plan.h.positions * positions_w;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t run = (first_tile + t) / plan.tiles_per_run;
      int64_t pixel = (first_tile + t) % plan.tiles_per_run * plan.pixel_width;
      const int64_t end = min_of(pixel + plan.pixel_width, plan.run_length);
      int64_t at = t * plan.pixel_width;
      if (plan.batch_innermost) {
        runs[count++] = {at, end - pixel, pixel, run / positions_w, run % positions_w};
        continue;
      }
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

  // The part [begin, end) of a run whose source exists at this offset, and where its first element lies.
  struct Piece {
    int64_t begin, end, source;
  };
  Piece piece_of(const PixelRun& run, int64_t offset_h, int64_t offset_w) const {
    const int64_t ih = run.jh * plan.h.source_step + offset_h, iw = run.jw * plan.w.source_step + offset_w;
    if (ih < 0 || ih >= plan.h.source) return {0, 0, 0};
    if (plan.batch_innermost) {
      if (iw < 0 || iw >= plan.w.source) return {0, 0, 0};
      return {0, run.count, plan.source.at(run.n, 0, ih, iw)};
    }
    const int64_t begin = iw >= 0 ? 0 : (-iw + plan.w.source_step - 1) / plan.w.source_step;
    const int64_t end = iw >= plan.w.source ? 0 : min_of(run.count, (plan.w.source - 1 - iw) / plan.w.source_step + 1);
    return {begin, end, plan.source.at(run.n, 0, ih, iw + begin * plan.w.source_step)};
  }

  // Packs one block of channels x offsets for all tiles of the block; present[tile][offset] tells whether any pixel has a source there.
  // A tile of rows that lies in one row of one image, with every tap inside, is read where it is: in_place[tile] points to its first pixel.
  void pack_pixels(int64_t group, const PixelRun* runs, int64_t run_count, int64_t tiles, int64_t c0, int64_t channels, int64_t u0, int64_t offsets,
                   T* panel, bool* present, const T** in_place) const {
    const S* source = static_cast<const S*>(plan.source.data) + (group * plan.channels + c0) * plan.source.stride[1];
    const PixelRun* first = runs;
    for (int64_t t = 0; t < tiles; ++t) {
      const PixelRun* last = first;
      while (last < runs + run_count && last->at < (t + 1) * plan.pixel_width) ++last;
      T* to = panel + t * plan.pixel_width * offsets * channels;
      in_place[t] = nullptr;
      if (last == first + 1 && readable_in_place(*first)) {
        in_place[t] = reinterpret_cast<const T*>(source + plan.source.at(first->n, 0, first->jh * plan.h.source_step, first->jw * plan.w.source_step));
        for (int64_t u = 0; u < offsets; ++u) present[t * offsets + u] = true;
      } else if (plan.rows_across) {
        pack_as_rows(source, first, last, t * plan.pixel_width, channels, u0, offsets, to, present + t * offsets);
      } else {
        pack_as_lanes(source, first, last, t * plan.pixel_width, channels, u0, offsets, to, present + t * offsets);
      }
      first = last;
    }
  }

  bool readable_in_place(const PixelRun& run) const {
    if (sizeof(S) != sizeof(T) || !plan.rows_across || plan.batch_innermost || run.count != plan.pixel_width || plan.source.stride[1] != 1) return false;
    // Rows 4096 bytes apart would all compete for one set of the L1 cache.
    if (plan.w.source_step * plan.source.stride[3] * static_cast<int64_t>(sizeof(T)) % 4096 == 0) return false;
    const int64_t ih = run.jh * plan.h.source_step, iw = run.jw * plan.w.source_step, last_iw = iw + (run.count - 1) * plan.w.source_step;
    return ih + plan.offsets_h.front() >= 0 && ih + plan.offsets_h.back() < plan.h.source && iw + plan.offsets_w.front() >= 0 &&
           last_iw + plan.offsets_w.back() < plan.w.source;
  }

  // [offset][channel][pixel]: rows of the source, shifted.
  DECONV_PHASE void pack_as_lanes(const S* source, const PixelRun* first, const PixelRun* last, int64_t first_pixel, int64_t channels, int64_t u0, int64_t offsets,
                     T* to, bool* present) const {
    const int64_t pixel_stride = plan.batch_innermost ? plan.source.stride[0] : plan.source.stride[3] * plan.w.source_step;
    const int64_t width = plan.pixel_width, count_w = plan.offsets_w.size();
    for (int64_t u = 0; u < offsets; ++u, to += channels * width) {
      const int64_t offset_h = plan.offsets_h[(u0 + u) / count_w], offset_w = plan.offsets_w[(u0 + u) % count_w];
      int64_t found = 0;
      for (const PixelRun* run = first; run < last; ++run) {
        const Piece piece = piece_of(*run, offset_h, offset_w);
        found += max_of<int64_t>(0, piece.end - piece.begin);
      }
      present[u] = found > 0;
      if (found == 0) continue;
      if (found < width) clear(to, channels * width);
      for (const PixelRun* run = first; run < last; ++run) {
        const Piece piece = piece_of(*run, offset_h, offset_w);
        T* at = to + run->at - first_pixel + piece.begin;
        for (int64_t c = 0; c < channels; ++c)
          copy_strided(at + c * width, source + piece.source + c * plan.source.stride[1], pixel_stride, piece.end - piece.begin);
      }
    }
  }

  // [pixel][offset][channel]: where channels are contiguous and offsets follow each other, neighbouring taps are one copy.
  DECONV_PHASE void pack_as_rows(const S* source, const PixelRun* first, const PixelRun* last, int64_t first_pixel, int64_t channels, int64_t u0, int64_t offsets,
                    T* to, bool* present) const {
    const int64_t count_w = plan.offsets_w.size(), stride_c = plan.source.stride[1], stride_w = plan.source.stride[3];
    const bool consecutive = plan.offsets_w[count_w - 1] - plan.offsets_w[0] == count_w - 1;
    const bool contiguous = stride_c == 1 && stride_w == channels;
    for (int64_t u = 0; u < offsets; ++u) present[u] = false;
    for (int64_t u = 0, length; u < offsets; u += length) {
      const int64_t first_w = (u0 + u) % count_w, offset_h = plan.offsets_h[(u0 + u) / count_w];
      length = consecutive ? min_of(count_w - first_w, offsets - u) : 1;
      for (const PixelRun* run = first; run < last; ++run) {
        const int64_t ih = run->jh * plan.h.source_step + offset_h;
        const bool inside = ih >= 0 && ih < plan.h.source;
        for (int64_t i = 0; i < run->count; ++i) {
          const int64_t n = run->n + (plan.batch_innermost ? i : 0), jw = run->jw + (plan.batch_innermost ? 0 : i);
          const int64_t iw = jw * plan.w.source_step + plan.offsets_w[first_w];
          const int64_t begin = inside ? min_of(length, max_of<int64_t>(0, -iw)) : length;
          const int64_t end = max_of(begin, min_of(length, plan.w.source - iw));
          T* row = to + ((run->at - first_pixel + i) * offsets + u) * channels;
          const S* from = source + plan.source.at(n, 0, ih, iw + begin);
          clear(row, begin * channels);
          if (contiguous) {
            copy_strided(row + begin * channels, from, 1, (end - begin) * channels);
          } else {
            for (int64_t tap = begin; tap < end; ++tap) copy_strided(row + tap * channels, from + (tap - begin) * stride_w, stride_c, channels);
          }
          clear(row + end * channels, (length - end) * channels);
          for (int64_t tap = begin; tap < end; ++tap) present[u + tap] = true;
        }
      }
    }
    const int64_t pixels = last == first ? 0 : (last - 1)->at + (last - 1)->count - first_pixel;
    for (int64_t pixel = pixels; pixel < plan.pixel_width; ++pixel) clear(to + pixel * offsets * channels, offsets * channels);
  }

  static void clear(T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
  }

  // -------------------------------------------------------------------------------------------------------------------------
  // Sums: [padded row][pixel], or with rows_across [pixel][padded row]

  int64_t pitch() const { return plan.rows_across ? plan.padded_rows : plan.block_tiles * plan.pixel_width; }
  int64_t sum_at(int64_t row, int64_t pixel) const { return plan.rows_across ? pixel * pitch() + row : row * pitch() + pixel; }

  // Segments in groups that are summed apart. A group ends at fixed places of K = (tap, channel), whatever is skipped: the result must not depend
  // on the other pixels of the tile. Neighbouring taps whose weights and pixels both go on are one segment.
  struct SegmentList {
    Segment<T>* list;
    int64_t* group_begin;
    int64_t count, groups;
  };

  DECONV_PHASE void multiply(int64_t group, int64_t chunk, int64_t tiles, int64_t c0, int64_t channels, int64_t u0, int64_t offsets, const T* panel,
                const bool* present, const T* const* in_place, bool accumulate, SegmentList& segments, int64_t* row_offsets, T* sums) const {
    const T* packed = weights + ((group * plan.row_chunks + chunk) * plan.channels + c0) * plan.weights_per_channel;
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    const int64_t step = plan.rows_across ? 1 : plan.row_width;
    int64_t* in_place_offsets = row_offsets + tile.rows;
    for (int m = 0; m < tile.rows; ++m) {
      row_offsets[m] = plan.rows_across ? m * offsets * channels : m;
      in_place_offsets[m] = m * plan.w.source_step * plan.source.stride[3];
    }
    for (const GatherClass& g : plan.classes) {
      const int64_t class_rows = rows * plan.h.classes[g.h].phases * plan.w.classes[g.w].phases;
      for (int64_t row = 0; row < class_rows; row += plan.row_width) {
        const T* w = packed + channels * (g.first_weight + row * g.taps);
        const T* base = nullptr;  // of the tile that the segments were listed for, while others may share them
        bool base_in_place = false;
        for (int64_t t = 0; t < tiles; ++t) {
          const T* x = in_place[t] ? in_place[t] : panel + t * plan.pixel_width * offsets * channels;
          const bool all_present = in_place[t] || complete(present + t * offsets, offsets);
          if (base && all_present && base_in_place == (in_place[t] != nullptr)) {
            for (int64_t s = 0; s < segments.count; ++s) (plan.rows_across ? segments.list[s].a : segments.list[s].b) += x - base;
            base = x;
          } else {
            list_segments(g, w, x, in_place[t] != nullptr, channels, u0, offsets, present + t * offsets, segments);
            base = all_present ? x : nullptr;
            base_in_place = in_place[t] != nullptr;
          }
          T* target = sums + sum_at(g.first_row + row, t * plan.pixel_width);
          for (int64_t group = 0; group < segments.groups; ++group) {
            const int64_t first = segments.group_begin[group], count = segments.group_begin[group + 1] - first;
            if (count > 0 || (group == 0 && !accumulate))
              tile.multiply(segments.list + first, count, in_place[t] ? in_place_offsets : row_offsets, step, target, pitch(), accumulate || group > 0);
          }
        }
      }
    }
  }

  static bool complete(const bool* present, int64_t offsets) {
    bool all = true;
    for (int64_t u = 0; u < offsets; ++u) all &= present[u];
    return all;
  }

  void list_segments(const GatherClass& g, const T* w, const T* x, bool in_place, int64_t channels, int64_t u0, int64_t offsets, const bool* present,
                     SegmentList& segments) const {
    const int64_t pixel_step = plan.rows_across ? 1 : plan.pixel_width;
    segments.count = segments.groups = 0;
    for (int64_t k0 = 0; k0 == 0 || k0 < g.taps * channels; k0 += kPartialSum) {
      segments.group_begin[segments.groups++] = segments.count;
      const int64_t k1 = min_of(k0 + kPartialSum, g.taps * channels);
      int64_t last = -1;
      const T* next = nullptr;  // where the pixels of the last segment go on
      for (int64_t tap = k0 / channels; tap * channels < k1; ++tap) {
        const int64_t u = g.offset_at[tap] - u0;
        if (u < 0 || u >= offsets || !present[u]) continue;
        const int64_t begin = max_of(k0, tap * channels), end = min_of(k1, (tap + 1) * channels), c = begin - tap * channels;
        const T* pixel = in_place ? x + plan.source_at[g.offset_at[tap]] + c : x + (u * channels + c) * pixel_step;
        const T* weight = w + begin * plan.row_width;
        if (pixel == next && begin == last) {
          segments.list[segments.count - 1].length += end - begin;
        } else {
          segments.list[segments.count++] = plan.rows_across ? Segment<T>{pixel, weight, end - begin} : Segment<T>{weight, pixel, end - begin};
        }
        next = pixel + (end - begin) * pixel_step;
        last = end;
      }
    }
    segments.group_begin[segments.groups] = segments.count;
  }

  // Zeros that stand for padding turn into NaN against infinite operands. Whatever came out as NaN is computed again from the definition.
  DECONV_PHASE void repair(int64_t group, int64_t chunk, const PixelRun* runs, int64_t run_count, int64_t tiles, T* sums) const {
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk), pixels = tiles * plan.pixel_width;
    bool clean = true;
    for (const GatherClass& g : plan.classes) {
      const int64_t class_rows = rows * plan.h.classes[g.h].phases * plan.w.classes[g.w].phases;
      const int64_t outer = plan.rows_across ? pixels : class_rows, inner = plan.rows_across ? class_rows : pixels;
      for (int64_t i = 0; i < outer; ++i) {
        const T* line = sums + (plan.rows_across ? sum_at(g.first_row, i) : sum_at(g.first_row + i, 0));
        int broken = 0;
        for (int64_t j = 0; j < inner; ++j) broken |= line[j] != line[j];
        clean &= broken == 0;
      }
    }
    if (clean) return;
    Params params = plan.params;
    params.bias = nullptr;
    const int64_t first = group * plan.rows + chunk * plan.row_chunk;
    for_each_place(chunk, runs, run_count, [&](int64_t row, int64_t padded_row, const PixelRun& run, int64_t i, int64_t th, int64_t tw) {
      T& sum = sums[sum_at(padded_row, run.at + i)];
      if (sum == sum) return;
      const int64_t n = plan.batch_innermost ? run.n + i : run.n;
      sum = static_cast<T>(plan.op == Op::kForward ? reference::forward_element<double, S>(params, n, first + row, th, tw)
                                                   : reference::grad_input_element<double, S>(params, n, first + row, th, tw));
    });
  }

  // Calls place(row within the chunk, padded row, run, index in the run, target h, target w) for every target of the block.
  template <class Place>
  void for_each_place(int64_t chunk, const PixelRun* runs, int64_t run_count, const Place& place) const {
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
                const int64_t tw = (run->jw + (plan.batch_innermost ? 0 : i)) * plan.w.target_step + w.first_phase + rw;
                if (tw >= 0 && tw < plan.w.target) place(row, g.first_row + row_of(h, w, rows, row, rh, rw), *run, i, th, tw);
              }
            }
    }
  }

  // -------------------------------------------------------------------------------------------------------------------------
  // Store: bias, rounding, phases back to their places

  T bias_of(int64_t row) const {
    return plan.params.bias ? convert<T>(static_cast<const S*>(plan.params.bias)[row * plan.params.bias_stride]) : T(0);
  }

  DECONV_PHASE void store(int64_t group, int64_t chunk, const PixelRun* runs, int64_t run_count, const T* sums, T* bias) const {
    const int64_t first = group * plan.rows + chunk * plan.row_chunk, rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    for (int64_t row = 0; row < rows; ++row) bias[row] = bias_of(first + row);
    S* target = static_cast<S*>(plan.target.data) + first * plan.target.stride[1];
    if (!plan.rows_across && !plan.batch_innermost && plan.target.stride[3] == 1) return store_interleaved(rows, runs, run_count, sums, bias, target);
    if (plan.rows_across && plan.rows_by_phase) return store_rows(rows, runs, run_count, sums, bias, target);
    store_strided(rows, runs, run_count, sums, bias, target);
  }

  // Any strides: one pass a row, phase and run.
  DECONV_PHASE void store_strided(int64_t rows, const PixelRun* runs, int64_t run_count, const T* sums, const T* bias, S* target) const {
    const int64_t from_step = plan.rows_across ? pitch() : 1;
    const int64_t to_step = plan.batch_innermost ? plan.target.stride[0] : plan.w.target_step * plan.target.stride[3];
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t rh = 0; rh < h.phases; ++rh)
          for (int64_t rw = 0; rw < w.phases; ++rw) {
            const T* line = sums + sum_at(g.first_row + row_of(h, w, rows, row, rh, rw), 0);
            for (const PixelRun* run = runs; run < runs + run_count; ++run) {
              const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh, tw = run->jw * plan.w.target_step + w.first_phase + rw;
              if (th < 0 || th >= plan.h.target) continue;
              const Range inside = targets_inside(*run, tw);
              const T* from = line + (run->at + inside.begin) * from_step;
              S* to = target + plan.target.at(run->n, row, th, tw) + inside.begin * to_step;
              for (int64_t i = inside.begin; i < inside.end; ++i, from += from_step, to += to_step) *to = convert<S>(*from + bias[row]);
            }
          }
    }
  }

  // Which pixels of a run, whose first target is column tw, have their target inside.
  Range targets_inside(const PixelRun& run, int64_t tw) const {
    const int64_t step = plan.w.target_step;
    if (plan.batch_innermost) return {0, tw >= 0 && tw < plan.w.target ? run.count : 0};
    const int64_t begin = tw >= 0 ? 0 : (-tw + step - 1) / step;
    const int64_t end = tw >= plan.w.target ? 0 : min_of(run.count, (plan.w.target - 1 - tw) / step + 1);
    return {min_of(begin, end), end};
  }

  // Pixels are lanes and the target's rows are contiguous: the phases of a row are interleaved, so that whole cache lines are written.
  DECONV_PHASE void store_interleaved(int64_t rows, const PixelRun* runs, int64_t run_count, const T* sums, const T* bias, S* target) const {
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
                if (phase >= p0 && phase < p0 + width) from[phase - p0] = sums + sum_at(g.first_row + row_of(h, w, rows, row, rh, rw), 0);
            }
            for (const PixelRun* run = runs; run < runs + run_count; ++run) {
              const int64_t th = run->jh * plan.h.target_step + plan.h.classes[class_h].first_phase + rh;
              if (th < 0 || th >= plan.h.target) continue;
              interleave(target + plan.target.at(run->n, row, th, 0), run->jw * step + first_phase + p0, step, plan.w.target, from, width, run->at,
                         run->count, bias[row]);
            }
          }
  }

  // Rows are lanes and contiguous in the target (channels_last): one run of rows a pixel and phase.
  DECONV_PHASE void store_rows(int64_t rows, const PixelRun* runs, int64_t run_count, const T* sums, const T* bias, S* target) const {
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      for (const PixelRun* run = runs; run < runs + run_count; ++run)
        for (int64_t rh = 0; rh < h.phases; ++rh) {
          const int64_t th = run->jh * plan.h.target_step + h.first_phase + rh;
          if (th < 0 || th >= plan.h.target) continue;
          for (int64_t i = 0; i < run->count; ++i)
            for (int64_t rw = 0; rw < w.phases; ++rw) {
              const int64_t tw = (run->jw + (plan.batch_innermost ? 0 : i)) * plan.w.target_step + w.first_phase + rw;
              if (tw < 0 || tw >= plan.w.target) continue;
              const T* from = sums + sum_at(g.first_row + row_of(h, w, rows, 0, rh, rw), run->at + i);
              S* __restrict to = target + plan.target.at(plan.batch_innermost ? run->n + i : run->n, 0, th, tw);
              for (int64_t row = 0; row < rows; ++row) to[row] = convert<S>(from[row] + bias[row]);
            }
        }
    }
  }

  // -------------------------------------------------------------------------------------------------------------------------
  // One block of pixels, `chunks` chunks of rows

  void block(int64_t group, int64_t first_tile, int64_t first_chunk, int64_t chunks) const {
    const int64_t tiles = min_of(plan.block_tiles, plan.tiles() - first_tile);
    const int64_t offsets = plan.offsets(), pixels = plan.block_tiles * plan.pixel_width;
    const int64_t lanes = kLanes<T>;
    T *panel, *sums, *bias;
    bool* present;
    const T** in_place;
    PixelRun* runs;
    SegmentList segments;
    int64_t* row_offsets;
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      panel = carver.take<T>(pixels * plan.channel_block * plan.offset_block + lanes);
      sums = carver.take<T>(pixels * plan.padded_rows);
      bias = carver.take<T>(plan.row_chunk);
      present = carver.take<bool>(plan.block_tiles * plan.offset_block);
      in_place = carver.take<const T*>(plan.block_tiles);
      runs = carver.take<PixelRun>(pixels);
      // A tap spans at most one more group than its channels fill.
      const int64_t groups = offsets * plan.channel_block / kPartialSum + 2;
      segments.list = carver.take<Segment<T>>(offsets + groups);
      segments.group_begin = carver.take<int64_t>(groups);
      row_offsets = carver.take<int64_t>(2 * tile.rows);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));

    const int64_t run_count = list_runs(first_tile, tiles, runs);
    const bool one_panel = plan.channel_block >= plan.channels && plan.offset_block >= offsets;
    for (int64_t chunk = first_chunk; chunk < first_chunk + chunks; ++chunk) {
      if (offsets == 0)
        for (int64_t i = 0; i < pixels * plan.padded_rows; ++i) sums[i] = 0;
      for (int64_t c0 = 0; c0 < plan.channels; c0 += plan.channel_block)
        for (int64_t u0 = 0; u0 < offsets; u0 += plan.offset_block) {
          const int64_t channels = min_of(plan.channel_block, plan.channels - c0), u = min_of(plan.offset_block, offsets - u0);
          if (!one_panel || chunk == first_chunk) pack_pixels(group, runs, run_count, tiles, c0, channels, u0, u, panel, present, in_place);
          multiply(group, chunk, tiles, c0, channels, u0, u, panel, present, in_place, c0 + u0 > 0, segments, row_offsets, sums);
        }
      repair(group, chunk, runs, run_count, tiles, sums);
      store(group, chunk, runs, run_count, sums, bias);
    }
  }
};

template <class S>
void gather_gemm(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  constexpr int kTiles = sizeof(Tiles<T>::list) / sizeof(Tile<T>);
  TileShape shapes[kTiles];
  for (int i = 0; i < kTiles; ++i) shapes[i] = {Tiles<T>::list[i].rows, Tiles<T>::list[i].vectors * kLanes<T>};
  const GatherPlan plan = plan_gather(op, params, shapes, kTiles, kLanes<T>, sizeof(T), threads);

  T* packed = static_cast<T*>(call_scratch(plan.weight_elements() * sizeof(T)));
  const GatherGemm<S> gemm{plan, Tiles<T>::list[plan.tile], packed};
  const int64_t channel_blocks = (plan.channels + plan.channel_block - 1) / plan.channel_block;
  parallel_for(plan.groups * plan.row_chunks * channel_blocks, threads, [&](int64_t task) {
    const int64_t c0 = task % channel_blocks * plan.channel_block, rest = task / channel_blocks;
    gemm.pack_weights(rest / plan.row_chunks, rest % plan.row_chunks, c0, min_of(plan.channel_block, plan.channels - c0));
  });

  const int64_t blocks = (plan.tiles() + plan.block_tiles - 1) / plan.block_tiles;
  const int64_t splits = (plan.row_chunks + plan.chunks_per_task - 1) / plan.chunks_per_task;
  parallel_for(plan.groups * blocks * splits, threads, [&](int64_t task) {
    const int64_t first_chunk = task % splits * plan.chunks_per_task, rest = task / splits;
    gemm.block(rest / blocks, rest % blocks * plan.block_tiles, first_chunk, min_of(plan.chunks_per_task, plan.row_chunks - first_chunk));
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
