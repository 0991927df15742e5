// Packing the pixels of the gather product (gather_gemm.h), once a block.
#pragma once

#include "gather_runs.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Of a pair of rows, those that exist (pairs.h); anything else as it is.
template <class Source>
inline Source of_pair(Source at, bool, bool) {
  return at;
}

// T: elements of the panel. Source: pointer to what is packed.
template <class T, class Source>
struct GatherPixels : GatherRuns<T> {
  using GatherRuns<T>::plan;
  Source data;

  Source element(Source source, int64_t n, int64_t c, int64_t ih, int64_t iw) const {
    return of_pair(source + plan.source.at(n, c, ih - plan.rows_apart, iw), ih >= plan.rows_apart,
                   ih < plan.h.source - plan.rows_apart);
  }

  // The part [begin, end) of a run whose source exists at this offset, and the row and column of
  // its first element.
  struct Piece {
    int64_t begin, end, ih, iw;
  };
  Piece piece_of(const PixelRun& run, int64_t offset_h, int64_t offset_w) const {
    const int64_t ih = run.jh * plan.h.source_step + offset_h,
                  iw = run.jw * plan.w.source_step + offset_w;
    if (ih < 0 || ih >= plan.h.source) return {0, 0, 0, 0};
    if (plan.batch_innermost) return {0, iw < 0 || iw >= plan.w.source ? 0 : run.count, ih, iw};
    const int64_t begin = iw >= 0 ? 0 : (-iw + plan.w.source_step - 1) / plan.w.source_step;
    const int64_t end = iw >= plan.w.source
                            ? 0
                            : min_of(run.count, (plan.w.source - 1 - iw) / plan.w.source_step + 1);
    return {begin, end, ih, iw + begin * plan.w.source_step};
  }

  // Packs one block of channels x offsets for all tiles of the block that are not read where they
  // are; `joined` are the runs of these. present[tile][offset] tells whether any pixel has a source
  // there.
  void pack(int64_t group, int64_t first_pixel, const PixelRun* runs, int64_t run_count,
            const PixelRun* joined, int64_t joined_count, const TilePlace* places, int64_t tiles,
            int64_t c0, int64_t channels, int64_t u0, int64_t offsets, T* panel,
            bool* present) const {
    const Source source = data + (group * plan.channels + c0) * plan.source.stride[1];
    const PixelRun* first = runs;
    const bool planes = has_planes();
    for (int64_t t = 0; t < tiles; ++t) {
      const PixelRun* last = first;
      while (last < runs + run_count && last->at < (t + 1) * plan.pixel_width) ++last;
      T* to = panel + t * plan.tile_pitch(channels, offsets, sizeof(T));
      if (places[t].source >= 0 || plan.flat || plan.by_channel) {
        for (int64_t u = 0; u < offsets; ++u) present[t * offsets + u] = true;
      } else if (plan.rows_across) {
        pack_as_rows(source, first, last, t * plan.pixel_width, channels, u0, offsets, to,
                     present + t * offsets);
      } else {
        pack_as_lanes(source, first, last, t * plan.pixel_width, channels, u0, offsets, planes, to,
                      present + t * offsets);
      }
      first = last;
    }
    if (planes) pack_planes(source, joined, joined_count, channels, u0, offsets, panel);
    if (plan.by_channel) pack_tap_rows(source, joined, joined_count, tiles, u0, offsets, panel);
    if (!plan.flat || joined_count == 0) return;
    if (plan.rows_across) {
      pack_flat_as_rows(source, first_pixel, tiles, channels, panel);
    } else {
      pack_flat_as_lanes(source, first_pixel, tiles, channels, panel);
    }
  }

  // The rows of the images of the residue `rh` that `tiles` tiles from position `first` of all on
  // read: calls copy(row of channel 0, first column, positions, first position of the panel), or
  // clear(positions, first position) for rows that do not exist.
  template <class Copy, class Clear>
  void for_each_flat_row(Source source, int64_t first, int64_t tiles, int64_t rh, const Copy& copy,
                         const Clear& clear_row) const {
    const int64_t pitch = plan.w.positions, rows = plan.h.positions;
    int64_t n = first / pitch / rows, jh = first / pitch % rows, jw = first % pitch, count;
    const int64_t all = tiles * plan.pixel_width + plan.flat_reach;
    for (int64_t at = 0; at < all; at += count, jw = 0) {
      const int64_t ih = jh * plan.h.source_step + plan.offsets_h.front() + rh;
      count = min_of(pitch - jw, all - at);
      if (n < plan.batch && ih >= 0 && ih < plan.h.source) {
        copy(element(source, n, 0, ih, 0), jw * plan.w.source_step + plan.offsets_w.front(), count,
             at);
      } else {
        clear_row(count, at);
      }
      if (++jh == rows) {
        jh = 0;
        ++n;
      }
    }
  }

  // [channel][residue of h][residue of w][position]
  DECONV_PHASE void pack_flat_as_lanes(Source source, int64_t first, int64_t tiles,
                                       int64_t channels, T* panel) const {
    if (plan.source.stride[3] != 1) return transpose_flat(source, first, tiles, channels, panel);
    const int64_t step_w = plan.w.source_step;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < plan.count_residues_h(); ++r) {
        T* to = panel + c * plan.flat_channel + r * step_w * plan.flat_residue;
        for_each_flat_row(
            source, first, tiles, plan.residues_h[r],
            [&](Source row, int64_t column, int64_t count, int64_t at) {
              split_row(row + c * plan.source.stride[1], column, count, to + at, plan.flat_residue);
            },
            [&](int64_t count, int64_t at) {
              for (int64_t rw = 0; rw < step_w; ++rw)
                clear(to + at + rw * plan.flat_residue, count);
            });
      }
  }

  // The same where channels are contiguous.
  void transpose_flat(Source source, int64_t first, int64_t tiles, int64_t channels,
                      T* panel) const {
    const int64_t stride = plan.source.stride[3], step = plan.w.source_step;
    for (int64_t r = 0; r < plan.residues(); ++r) {
      T* const to = panel + r * plan.flat_residue;
      const auto clear_pixels = [&](int64_t count, int64_t at) {
        for (int64_t c = 0; c < channels; ++c) clear(to + c * plan.flat_channel + at, count);
      };
      for_each_flat_row(
          source, first, tiles, plan.residues_h[r / step],
          [&](Source row, int64_t column, int64_t count, int64_t at) {
            column += r % step;
            const int64_t begin = min_of(count, ceil_div(max_of<int64_t>(0, -column), step)),
                          end =
                              max_of(begin, min_of(count, ceil_div(plan.w.source - column, step)));
            clear_pixels(begin, at);
            transpose(row + (column + begin * step) * stride, step * stride, end - begin, channels,
                      to + at + begin, plan.flat_channel);
            clear_pixels(count - end, at + end);
          },
          clear_pixels);
    }
  }

  // [residue of h][position][residue of w][channel]: the pixels of a row as they are, or transposed
  // rows of all channels.
  DECONV_PHASE void pack_flat_as_rows(Source source, int64_t first, int64_t tiles, int64_t channels,
                                      T* panel) const {
    const int64_t position = plan.flat_position(channels), stride = plan.source.stride[3];
    for (int64_t r = 0; r < plan.count_residues_h(); ++r) {
      T* to = panel + r * plan.flat_residue * channels;
      for_each_flat_row(
          source, first, tiles, plan.residues_h[r],
          [&](Source row, int64_t column, int64_t count, int64_t at) {
            T* const line = to + at * position;
            const int64_t pixels = count * plan.w.source_step;
            const int64_t begin = min_of(pixels, max_of<int64_t>(0, -column)),
                          end = max_of(begin, min_of(pixels, plan.w.source - column));
            clear(line, begin * channels);
            if (plan.source.stride[1] != 1) {
              transpose(row + column + begin, plan.source.stride[1], channels, end - begin,
                        line + begin * channels, channels);
            } else if (stride == channels) {
              copy_strided(line + begin * channels, row + (column + begin) * stride, 1,
                           (end - begin) * channels);
            } else {
              for (int64_t i = begin; i < end; ++i)
                copy_strided(line + i * channels, row + (column + i) * stride, 1, channels);
            }
            clear(line + end * channels, (pixels - end) * channels);
          },
          [&](int64_t count, int64_t at) { clear(to + at * position, count * position); });
    }
  }

  // A few rows of a channel are read, then those of the next one, far away in memory: no stream
  // that the processor would see ahead.
  void fetch_next_channel(Source row, int64_t first, int64_t count) const {
    const Source next = row + plan.source.stride[1];
    const int64_t end = min_of(first + count, plan.w.source);
    for (int64_t i = max_of<int64_t>(first, 0); i < end; i += 64 / plan.stored_bytes)
      prefetch(next + i);
  }

  // to[r * pitch + i] = row[first + i * step + r] for i < count, r < step; zero outside of the row.
  // Up to a vector more is written after each.
  void split_row(Source row, int64_t first, int64_t count, T* to, int64_t pitch) const {
    const int64_t step = plan.w.source_step;
    // `head` positions begin before the row. They come last, for the vectors of one residue may end
    // in the head of the next one.
    const int64_t head = first < 0 ? min_of(count, (-first + step - 1) / step) : 0;
    deinterleave(to + head, pitch, row + first + head * step, step, count - head,
                 plan.w.source - first - head * step);
    for (int64_t i = 0; i < head; ++i)
      for (int64_t r = 0; r < step; ++r) {
        const int64_t iw = first + i * step + r;
        to[r * pitch + i] = iw >= 0 && iw < plan.w.source ? convert<T>(row[iw]) : T(0);
      }
  }

  // [offset][channel][pixel]: rows of the source, shifted. With planes the caller fills them in.
  DECONV_PHASE void pack_as_lanes(Source source, const PixelRun* first, const PixelRun* last,
                                  int64_t first_pixel, int64_t channels, int64_t u0,
                                  int64_t offsets, bool planes, T* to, bool* present) const {
    const int64_t width = plan.pixel_width, count_w = plan.offsets_w.size();
    const int64_t step =
        plan.batch_innermost ? plan.source.stride[0] : plan.source.stride[3] * plan.w.source_step;
    for (int64_t u = 0; u < offsets; ++u, to += plan.tap_pitch(channels, sizeof(T))) {
      const int64_t offset_h = plan.offsets_h[(u0 + u) / count_w],
                    offset_w = plan.offsets_w[(u0 + u) % count_w];
      int64_t found = 0;
      for (const PixelRun* run = first; run < last; ++run) {
        const Piece piece = piece_of(*run, offset_h, offset_w);
        found += max_of<int64_t>(0, piece.end - piece.begin);
      }
      present[u] = found > 0;
      if (found > 0 && found < width) clear(to, channels * width);
      if (found == 0 || planes) continue;
      for (const PixelRun* run = first; run < last; ++run) {
        const Piece piece = piece_of(*run, offset_h, offset_w);
        T* at = to + run->at - first_pixel + piece.begin;
        if (piece.begin >= piece.end) continue;
        const Source from = element(source, run->n, 0, piece.ih, piece.iw);
        for (int64_t c = 0; c < channels; ++c)
          copy_strided(at + c * width, from + c * plan.source.stride[1], step,
                       piece.end - piece.begin, to + width - at);
      }
    }
  }

  // Planes: several taps read the same row of the source, `source_step` apart. The row is split
  // into its residues once, and each tap copies from one of them. Channel by channel, so that
  // memory is read in its own order: neighbouring channels are often a power of two apart and would
  // compete for one set of the cache.
  static constexpr int64_t kPlaneElements = 4096, kPlaneTaps = 128;

  bool has_planes() const {
    const int64_t taps = plan.offsets_w.size(), step = plan.w.source_step;
    return !plan.rows_across && !plan.flat && taps >= step && taps <= kPlaneTaps &&
           !plan.batch_innermost && plan.w.positions >= (step == 1 ? 2 : 1) * kLanes<T> &&
           plan.source.stride[3] == 1 && plane_pixels() >= kLanes<T>;
  }
  // Positions split at a time.
  int64_t plane_pixels() const {
    const int64_t shifts = floor_div(plan.offsets_w.back(), plan.w.source_step) -
                           floor_div(plan.offsets_w.front(), plan.w.source_step);
    return plane_pitch() - shifts;
  }

  // Elements from one residue to the next.
  int64_t plane_pitch() const {
    return kPlaneElements / plan.w.source_step / kLanes<T> * kLanes<T>;
  }

  // `panel` is that of all tiles of the block, `joined` their runs.
  DECONV_PHASE void pack_planes(Source source, const PixelRun* joined, int64_t run_count,
                                int64_t channels, int64_t u0, int64_t offsets, T* panel) const {
    const int64_t count_w = plan.offsets_w.size(), step = plan.w.source_step,
                  pixels = plane_pixels(), width = plan.pixel_width;
    const int64_t tap_pitch = plan.tap_pitch(channels, sizeof(T)),
                  tile_pitch = plan.tile_pitch(channels, offsets, sizeof(T));
    T planes[kPlaneElements + kLanes<T>];  // the last vector of a plane may reach beyond it
    int64_t shift[kPlaneTaps], plane_at[kPlaneTaps];  // a tap's, in positions and in `planes`
    for (int64_t w = 0; w < count_w; ++w) {
      shift[w] = floor_div(plan.offsets_w[w], step);
      plane_at[w] = (plan.offsets_w[w] - shift[w] * step) * plane_pitch() + shift[w];
    }
    for (int64_t c = 0; c < channels; ++c)
      for (const PixelRun* run = joined; run < joined + run_count; ++run)
        for (int64_t u = 0, first_w = u0 % count_w, h = u0 / count_w, taps; u < offsets;
             u += taps, first_w = 0, ++h) {
          taps = min_of(count_w - first_w, offsets - u);
          const int64_t ih = run->jh * plan.h.source_step + plan.offsets_h[h];
          if (ih < 0 || ih >= plan.h.source) continue;
          const Source row = element(source, run->n, c, ih, 0);
          const int64_t base = shift[first_w], last = shift[first_w + taps - 1];
          for (int64_t at = 0; at < run->count; at += pixels) {
            const int64_t count = min_of(pixels, run->count - at);
            fetch_next_channel(row, (run->jw + at + base) * step, (count + last - base) * step);
            split_row(row, (run->jw + at + base) * step, count + last - base, planes,
                      plane_pitch());
            const int64_t first_tile =
                              static_cast<uint32_t>(run->at + at) / static_cast<uint32_t>(width),
                          first_lane = run->at + at - first_tile * width;
            T* tile = panel + first_tile * tile_pitch + u * tap_pitch + c * width;
            for (int64_t tap = first_w; tap < first_w + taps; ++tap, tile += tap_pitch)
              copy_to_tiles(planes + plane_at[tap] - base, count, tile, first_lane, tile_pitch);
          }
        }
  }

  // Pixels that follow each other, the first of them at a lane of the first tile.
  void copy_to_tiles(const T* from, int64_t count, T* tile, int64_t lane, int64_t pitch) const {
    const int64_t width = plan.pixel_width;
    if (lane > 0) {
      const int64_t head = min_of(width - lane, count);
      copy_every<1>(tile + lane, from, head, width - lane);
      from += head;
      count -= head;
      tile += pitch;
    }
    for (; count >= width; from += width, count -= width, tile += pitch)
      copy_vectors(tile, from, width / kLanes<T>);
    if (count > 0) copy_every<1>(tile, from, count, width);
  }

  // [pixel][offset] of one channel: the taps of a pixel in a row of the source are neighbours here
  // as there. Row by row, so that memory is read in its own order.
  DECONV_PHASE void pack_tap_rows(Source source, const PixelRun* joined, int64_t run_count,
                                  int64_t tiles, int64_t u0, int64_t offsets, T* panel) const {
    const int64_t count_w = plan.offsets_w.size(), step = plan.w.source_step,
                  pitch = plan.pixel_pitch(1, offsets, sizeof(T));
    int64_t pixels = 0;
    for (const PixelRun* run = joined; run < joined + run_count; ++run) {
      pixels = run->at + run->count;
      for (int64_t u = 0, taps; u < offsets; u += taps) {
        const int64_t first_w = (u0 + u) % count_w;
        taps = min_of(count_w - first_w, offsets - u);
        const int64_t ih = run->jh * plan.h.source_step + plan.offsets_h[(u0 + u) / count_w];
        T* to = panel + run->at * pitch + u;
        if (ih < 0 || ih >= plan.h.source) {
          for (int64_t i = 0; i < run->count; ++i) clear(to + i * pitch, taps);
          continue;
        }
        const Source row = element(source, run->n, 0, ih, 0);
        int64_t iw = run->jw * step + plan.offsets_w[first_w];
        for (int64_t i = 0; i < run->count; ++i, iw += step, to += pitch) {
          const int64_t begin = max_of<int64_t>(0, min_of(taps, -iw)),
                        end = max_of(begin, min_of(taps, plan.w.source - iw));
          clear(to, begin);
          copy_every<1>(to + begin, row + iw + begin, end - begin, pitch - u - begin);
          clear(to + end, taps - end);
        }
      }
    }
    for (; pixels < tiles * plan.pixel_width; ++pixels) clear(panel + pixels * pitch, offsets);
  }

  // [pixel][offset][channel]: where channels are contiguous and offsets follow each other,
  // neighbouring taps are one copy.
  DECONV_PHASE void pack_as_rows(Source source, const PixelRun* first, const PixelRun* last,
                                 int64_t first_pixel, int64_t channels, int64_t u0, int64_t offsets,
                                 T* to, bool* present) const {
    const int64_t count_w = plan.offsets_w.size(), stride_c = plan.source.stride[1],
                  stride_w = plan.source.stride[3];
    const bool consecutive = plan.offsets_w[count_w - 1] - plan.offsets_w[0] == count_w - 1;
    const bool contiguous = stride_c == 1 && stride_w == channels,
               transposed = plan.transposes_taps();
    for (int64_t u = 0; u < offsets; ++u) present[u] = false;
    for (int64_t u = 0, length; u < offsets; u += length) {
      const int64_t first_w = (u0 + u) % count_w, offset_h = plan.offsets_h[(u0 + u) / count_w];
      length = consecutive ? min_of(count_w - first_w, offsets - u) : 1;
      for (const PixelRun* run = first; run < last; ++run) {
        const int64_t ih = run->jh * plan.h.source_step + offset_h;
        const bool inside = ih >= 0 && ih < plan.h.source;
        for (int64_t i = 0; i < run->count; ++i) {
          const int64_t n = run->n + (plan.batch_innermost ? i : 0),
                        jw = run->jw + (plan.batch_innermost ? 0 : i);
          const int64_t iw = jw * plan.w.source_step + plan.offsets_w[first_w];
          const int64_t begin = inside ? min_of(length, max_of<int64_t>(0, -iw)) : length;
          const int64_t end = max_of(begin, min_of(length, plan.w.source - iw));
          T* row = to + ((run->at - first_pixel + i) * offsets + u) * channels;
          const Source from = element(source, n, 0, ih, iw + begin);
          clear(row, begin * channels);
          if (contiguous) {
            copy_strided(row + begin * channels, from, 1, (end - begin) * channels);
          } else if (transposed) {
            transpose(from, stride_c, channels, end - begin, row + begin * channels, channels);
          } else {
            for (int64_t tap = begin; tap < end; ++tap)
              copy_strided(row + tap * channels, from + (tap - begin) * stride_w, stride_c,
                           channels);
          }
          clear(row + end * channels, (length - end) * channels);
          for (int64_t tap = begin; tap < end; ++tap) present[u + tap] = true;
        }
      }
    }
    const int64_t pixels = last == first ? 0 : (last - 1)->at + (last - 1)->count - first_pixel;
    for (int64_t pixel = pixels; pixel < plan.pixel_width; ++pixel)
      clear(to + pixel * offsets * channels, offsets * channels);
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
