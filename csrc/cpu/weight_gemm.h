// "gemm" for grad_weight:
//
//     dw[ci, co, k] = sum over n, i of x[n, ci, i] * dy[n, co, i * stride + k * dilation - pad]
//
// As a matrix product: rows (co, k) times lanes ci, summed over pixels. x is packed transposed,
// [pixel][ci]; dy is not multiplied out by taps: a padded patch of it is copied, and the tile reads
// row (co, k) of the patch with the stride of the problem.
//
//   for each chunk of (co, k) x lanes of ci x split of the pixels, in parallel:
//     for each block of pixels (lines of images):
//       pack x
//       for a few co at a time: pack patches of dy, multiply_tiles over the lines
//   add the splits in order, store
//
// The number of splits follows from the problem, never from the threads: results do not depend on
// their number.
#pragma once

#include "../parallel.h"
#include "../reference/elements.h"
#include "gather.h"
#include "microkernel.h"
#include "profile.h"
#include "scratch.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// How pixels and taps of one axis are found in a patch of dy: element tap * tap_step + pixel *
// pixel_step. Either the patch is the piece of dy that the pixels and taps span, or, where dilation
// or stride leave it mostly unused, one copy of the pixels a tap.
struct PatchAxis {
  int64_t extent, tap_step, pixel_step;
  bool by_tap;

  static PatchAxis make(const Axis& axis, int64_t pixels, int64_t taps) {
    const int64_t span = (pixels - 1) * axis.stride + (taps - 1) * axis.dilation + 1;
    if (span <= pixels * taps) return {span, axis.dilation, axis.stride, false};
    return {pixels * taps, pixels, 1, true};
  }

  // The output that element e of the patch holds; may lie outside dy.
  int64_t output(const Axis& axis, int64_t first_pixel, int64_t first_tap, int64_t pixels,
                 int64_t e) const {
    const int64_t pixel = by_tap ? e % pixels : 0, tap = by_tap ? e / pixels : 0;
    return (first_pixel + pixel) * axis.stride + (first_tap + tap) * axis.dilation - axis.pad +
           (by_tap ? 0 : e);
  }
};

template <class S>
struct WeightGemm {
  using T = typename Arithmetic<S>::type;

  // A thread's working set in its L2 cache: sums, packed x, patches of dy.
  static constexpr int64_t kSums = (512 << 10) / sizeof(T), kPatches = (128 << 10) / sizeof(T);
  static constexpr int64_t kLanesAtOnce = 192;  // lanes that share a patch
  // co whose patches are packed together where they lie together in dy: a cache line.
  static constexpr int64_t kOutputsTogether = 64 / sizeof(S);
  static constexpr int64_t kBlockPixels = 256;  // packed at a time
  static constexpr int64_t kTasks =
      16;  // enough to balance a few threads; pixels are split where the weight has fewer parts

  const Params& params;
  const Problem& p = params.problem;
  Tile<T> tile;
  int64_t group_in, group_out;
  int64_t width, lane_tiles, lane_parts;  // lanes of a tile; tiles of lanes in a part; parts
  int64_t outputs, kernel_h, kernel_w;    // co, kh, kw of a chunk
  int64_t chunks_o, chunks_h, chunks_w;   // their numbers
  int64_t patch_outputs,
      patch_rows;  // co whose patches are packed together; their rows (co, k), padded to tiles
  int64_t line, line_parts, lines, blocks, splits;  // pixels a line, lines across an image row,
                                                    // lines a block, blocks, splits of the blocks
  PatchAxis patch_h, patch_w;

  WeightGemm(const Params& given) : params(given) {
    group_in = p.c_in / p.groups;
    group_out = p.c_out / p.groups;
    choose_tile();
    choose_chunks();
    choose_lines();
  }

  // The tile that wastes least on its rows and lanes; cycles of a step as in gather.h.
  void choose_tile() {
    const int64_t rows = group_out * p.h.kernel * p.w.kernel;
    double least = 0;
    for (const Tile<T>& t : Tiles<T>::list) {
      const double step = cycles_per_step(t.rows, t.vectors);
      const double cycles =
          step *
          static_cast<double>((rows + t.rows - 1) / t.rows *
                              ((group_in + t.vectors * kLanes<T> - 1) / (t.vectors * kLanes<T>)));
      if (least == 0 || cycles < least) {
        least = cycles;
        tile = t;
      }
    }
    width = tile.vectors * kLanes<T>;
    const int64_t tiles = (group_in + width - 1) / width;
    lane_parts = (tiles * width + kLanesAtOnce - 1) / kLanesAtOnce;
    lane_tiles = (tiles + lane_parts - 1) / lane_parts;
    lane_parts = (tiles + lane_tiles - 1) / lane_tiles;
  }

  // Rows whose sums fit: several co with all taps, or a part of the taps of one.
  void choose_chunks() {
    const int64_t rows = max_of<int64_t>(1, kSums / (lane_tiles * width) - tile.rows);
    kernel_w = min_of(p.w.kernel, rows);
    kernel_h = min_of(p.h.kernel, max_of<int64_t>(1, rows / kernel_w));
    outputs = kernel_h < p.h.kernel || kernel_w < p.w.kernel
                  ? 1
                  : min_of(group_out, max_of<int64_t>(1, rows / (kernel_h * kernel_w)));
    chunks_w = (p.w.kernel + kernel_w - 1) / kernel_w;
    chunks_h = (p.h.kernel + kernel_h - 1) / kernel_h;
    chunks_o = (group_out + outputs - 1) / outputs;
    outputs = (group_out + chunks_o - 1) / chunks_o;
  }

  void choose_lines() {
    const int64_t together = params.y.stride[1] != 1          ? 1
                             : outputs < 2 * kOutputsTogether ? outputs
                                                              : kOutputsTogether;
    line_parts = (p.w.in + kPartialSum - 1) / kPartialSum;
    line = (p.w.in + line_parts - 1) / line_parts;
    lines = min_of(max_of<int64_t>(1, kBlockPixels / line), p.batch * p.h.in);
    while (true) {
      patch_h = PatchAxis::make(p.h, min_of(lines, p.h.in), kernel_h);
      patch_w = PatchAxis::make(p.w, line, kernel_w);
      if (patch_pitch() * together <= kPatches || (lines == 1 && line == 1)) break;
      if (lines > 1) {
        lines = (lines + 1) / 2;
      } else {
        line = (line + 1) / 2;
        line_parts = (p.w.in + line - 1) / line;
      }
    }
    blocks = line_parts * ((p.batch * p.h.in + lines - 1) / lines);
    splits = min_of(blocks, max_of<int64_t>(1, kTasks / parts()));

    // As many co as leave the fewest rows of their last tile empty.
    const int64_t most =
        min_of(outputs, max_of<int64_t>(1, kPatches / patch_pitch())) / together * together;
    const int64_t taps = kernel_h * kernel_w;
    const auto waste = [&](int64_t count) {
      return static_cast<double>(round_up<int64_t>(count * taps, tile.rows)) /
             static_cast<double>(count);
    };
    patch_outputs = max_of(most, together);
    for (int64_t count = most; count > most / 2; count -= together)
      if (waste(count) < waste(patch_outputs)) patch_outputs = count;
    patch_rows = round_up<int64_t>(patch_outputs * taps, tile.rows);
  }

  // A block of `lines` lines touches at most so many images; each has a patch of its own.
  int64_t images() const { return lines <= 1 ? 1 : (lines + p.h.in - 2) / p.h.in + 1; }
  // From one co's patches to the next.
  int64_t patch_pitch() const {
    return odd_lines(images() * patch_h.extent * patch_w.extent, sizeof(T));
  }
  int64_t parts() const { return p.groups * chunks_o * chunks_h * chunks_w * lane_parts; }
  int64_t sum_rows() const { return (outputs + patch_outputs - 1) / patch_outputs * patch_rows; }
  int64_t part_elements() const { return sum_rows() * lane_tiles * width; }

  struct Part {
    int64_t group, co, outputs, kh, kernel_h, kw, kernel_w, ci, lanes;
  };
  Part part_of(int64_t index) const {
    Part part;
    part.ci = index % lane_parts * lane_tiles * width;
    index /= lane_parts;
    part.kw = index % chunks_w * kernel_w;
    index /= chunks_w;
    part.kh = index % chunks_h * kernel_h;
    index /= chunks_h;
    part.co = index % chunks_o * outputs;
    part.group = index / chunks_o;
    part.outputs = min_of(outputs, group_out - part.co);
    part.kernel_h = min_of(kernel_h, p.h.kernel - part.kh);
    part.kernel_w = min_of(kernel_w, p.w.kernel - part.kw);
    part.lanes = min_of(lane_tiles * width, group_in - part.ci);
    return part;
  }

  // Where (co, kh, kw) stands among the rows: taps of a co follow each other, for they read the
  // same cache lines of its patch.
  int64_t row_of(const Part& part, int64_t co, int64_t kh, int64_t kw) const {
    return (co * part.kernel_h + kh) * part.kernel_w + kw;
  }

  // Lines of one image within a block: they share a patch.
  struct Strip {
    int64_t n, ih, lines;
  };

  // -------------------------------------------------------------------------------------------------------------------------

  // Sums over the blocks [begin, end) as [row][lane], rows (co, kh, kw) in groups of patch_rows;
  // into `sums`, or if that is null into the thread's scratch. Returns where they are.
  T* accumulate(const Part& part, int64_t begin, int64_t end, T* sums) const {
    T *own_sums, *packed_x, *patches;
    Strip* strips;
    SegmentList segments;
    TileTask<T>* tasks;
    int64_t* row_offsets;
    const int64_t pixels = lines * line, segment_pixels = min_of(line, p.w.in),
                  pitch = patch_pitch();
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      own_sums = carver.take<T>(sums ? 0 : part_elements());
      packed_x = carver.take<T>(lane_tiles * pixels * width);
      patches = carver.take<T>(patch_outputs * pitch);
      strips = carver.take<Strip>(images());
      segments.list = carver.take<Segment>(lines);
      tasks = carver.take<TileTask<T>>(patch_rows / tile.rows);
      row_offsets = carver.take<int64_t>(patch_rows);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    if (!sums) sums = own_sums;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t iw = block % line_parts * line, length = min_of(segment_pixels, p.w.in - iw);
      const int64_t first_line = block / line_parts * lines,
                    line_count = min_of(lines, p.batch * p.h.in - first_line);
      int64_t strip_count = 0;
      for (int64_t l = 0; l < line_count; l += strips[strip_count++].lines) {
        const int64_t ih = (first_line + l) % p.h.in;
        strips[strip_count] = {(first_line + l) / p.h.in, ih, min_of(p.h.in - ih, line_count - l)};
      }
      in_phase(Phase::kPack, [&] {
        for (int64_t t = 0; t * width < part.lanes; ++t) {
          T* to = packed_x + t * pixels * width;
          for (int64_t s = 0; s < strip_count; ++s)
            for (int64_t l = 0; l < strips[s].lines; ++l, to += length * width)
              pack_x(part, strips[s].n, t, strips[s].ih + l, iw, length, to);
        }
      });
      for (int64_t o = 0; o < part.outputs; o += patch_outputs) {
        const int64_t count = min_of(patch_outputs, part.outputs - o),
                      rows = count * part.kernel_h * part.kernel_w;
        in_phase(Phase::kPack, [&] {
          for (int64_t s = 0; s < strip_count; ++s)
            pack_patch(part, strips[s], o, count, iw,
                       patches + s * patch_h.extent * patch_w.extent);
        });
        for (int64_t row = 0; row < patch_rows; ++row)
          row_offsets[row] = 0;  // padding: any valid address
        for (int64_t co = 0; co < count; ++co)
          for (int64_t kh = 0; kh < part.kernel_h; ++kh)
            for (int64_t kw = 0; kw < part.kernel_w; ++kw)
              row_offsets[row_of(part, co, kh, kw)] =
                  co * pitch + kh * patch_h.tap_step * patch_w.extent + kw * patch_w.tap_step;
        T* block_sums = sums + o / patch_outputs * patch_rows * lane_tiles * width;
        segments.step_a = patch_w.pixel_step;
        segments.step_b = width;
        const int64_t at_once = max_of<int64_t>(1, kPartialSum / length);  // lines
        int64_t count_lines = 0;
        for (int64_t s = 0; s < strip_count; ++s)
          for (int64_t l = 0; l < strips[s].lines; ++l, ++count_lines)
            segments.list[count_lines] = {
                (s * patch_h.extent + l * patch_h.pixel_step) * patch_w.extent,
                count_lines * length * width, length, (count_lines + 1) % at_once == 0};
        segments.count = count_lines;
        in_phase(Phase::kProduct, [&] {
          for (int64_t t = 0; t * width < part.lanes; ++t) {
            int64_t count_tasks = 0;
            for (int64_t r = 0; r < rows; r += tile.rows)
              tasks[count_tasks++] = {patches,
                                      packed_x + t * pixels * width,
                                      row_offsets + r,
                                      {block_sums + r * lane_tiles * width + t * width,
                                       lane_tiles * width, tile.rows, block > begin, nullptr}};
            tile.panel_b(segments, tasks, count_tasks);
          }
        });
      }
    }
    return sums;
  }

  // One line of x for one tile of lanes: [pixel][width], zeros beyond the last channel.
  DECONV_PHASE void pack_x(const Part& part, int64_t n, int64_t t, int64_t ih, int64_t iw,
                           int64_t length, T* to) const {
    const int64_t lanes = min_of(width, part.lanes - t * width);
    const S* from = static_cast<const S*>(params.x.data) +
                    params.x.at(n, part.group * group_in + part.ci + t * width, ih, iw);
    const int64_t channel = params.x.stride[1], pixel = params.x.stride[3];
    if (lanes < width) clear(to, length * width);
    if (channel == 1) {
      for (int64_t i = 0; i < length; ++i) copy_strided(to + i * width, from + i * pixel, 1, lanes);
    } else if (pixel == 1) {
      transpose(from, channel, lanes, length, to, width);
    } else {
      for (int64_t l = 0; l < lanes; ++l)
        for (int64_t i = 0; i < length; ++i)
          to[i * width + l] = convert<T>(from[l * channel + i * pixel]);
    }
  }

  // The patches of dy that the pixels of a strip and the taps of the part touch, for `count` co
  // from o on; zeros outside dy.
  DECONV_PHASE void pack_patch(const Part& part, const Strip& strip, int64_t o, int64_t count,
                               int64_t iw, T* to) const {
    const S* from = static_cast<const S*>(params.y.data) +
                    params.y.at(strip.n, part.group * group_out + part.co + o, 0, 0);
    const int64_t stride_co = params.y.stride[1], strip_lines = min_of(lines, p.h.in),
                  extent = patch_w.extent, pitch = patch_pitch();
    // A row of a patch is one piece of dy, or one a tap.
    const int64_t pieces = patch_w.by_tap ? part.kernel_w : 1,
                  length = patch_w.by_tap ? line : extent, step = patch_w.by_tap ? p.w.stride : 1,
                  stride = step * params.y.stride[3];
    for (int64_t eh = 0; eh < patch_h.extent; ++eh) {
      const int64_t oh = patch_h.output(p.h, strip.ih, part.kh, strip_lines, eh);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t start = patch_w.output(p.w, iw, part.kw, line, piece * length);
        int64_t head = 0, tail = 0;
        if (oh >= 0 && oh < p.h.out && start < p.w.out) {
          tail = min_of(length, (p.w.out - 1 - start) / step + 1);
          head = min_of(tail, start < 0 ? ceil_div(-start, step) : 0);
        }
        T* row = to + eh * extent + piece * length;
        for (int64_t co = 0; co < count; ++co) {
          clear(row + co * pitch, head);
          clear(row + co * pitch + tail, length - tail);
        }
        if (head == tail) continue;
        const S* dy = from + oh * params.y.stride[2] + start * params.y.stride[3] + head * stride;
        if (stride_co == 1 && count > 1) {
          transpose(dy, stride, tail - head, count, row + head, pitch);
        } else {
          for (int64_t co = 0; co < count; ++co)
            copy_strided(row + co * pitch + head, dy + co * stride_co, stride, tail - head);
        }
      }
    }
  }

  // An element of dw for each ci, and the row of its sums. Those of `count` co from `first` on are
  // numbered in the order of dw.
  struct Element {
    int64_t co, kh, kw;
    int64_t at;  // from the first element of a ci on
    int64_t row;
  };
  Element element_of(const Part& part, int64_t first, int64_t count, int64_t index) const {
    const int64_t taps = part.kernel_h * part.kernel_w;
    const bool outputs_inner = params.w.stride[1] == 1;
    const int64_t co = outputs_inner ? index % count : index / taps,
                  tap = outputs_inner ? index / count : index % taps;
    const int64_t kh = tap / part.kernel_w, kw = tap % part.kernel_w;
    Element e{part.co + first + co, part.kh + kh, part.kw + kw, 0, row_of(part, co, kh, kw)};
    e.at = params.w.at(0, e.co, e.kh, e.kw);
    return e;
  }

  // [row][lane] to dw: squares are transposed, after which elements that follow each other in dw
  // are a vector.
  DECONV_PHASE void store(const Part& part, const T* sums) const {
    constexpr int64_t kN = kLanes<T>;
    for (int64_t first = 0; first < part.outputs; first += patch_outputs) {
      const int64_t count = min_of(patch_outputs, part.outputs - first),
                    rows = count * part.kernel_h * part.kernel_w;
      const T* from = sums + first / patch_outputs * patch_rows * lane_tiles * width;
      for (int64_t index = 0; index < rows; index += kN) {
        const int64_t some = min_of(kN, rows - index);
        Element elements[kN];
        bool together = true;
        for (int64_t i = 0; i < some; ++i) {
          elements[i] = element_of(part, first, count, index + i);
          together &= elements[i].at == elements[0].at + i;
        }
        for (int64_t lane = 0; lane < part.lanes; lane += kN) {
          Vector<T> square[kN];
          for (int64_t i = 0; i < kN; ++i)
            square[i] = i < some ? load_vector(from + elements[i].row * lane_tiles * width + lane)
                                 : Vector<T>{};
          transpose_step<T, kN / 2>(square);
          for (int64_t i = 0; i < min_of(kN, part.lanes - lane); ++i)
            store_elements(part.group * group_in + part.ci + lane + i, elements, some, together,
                           square[i]);
        }
      }
    }
  }

  // A zero of a padded patch against an infinite x leaves a NaN: such elements are computed again
  // from the definition.
  void store_elements(int64_t ci, const Element* elements, int64_t count, bool together,
                      Vector<T> sums) const {
    S* dw = static_cast<S*>(params.w.data) + params.w.at(ci, 0, 0, 0);
    if (together) store_first_as(dw + elements[0].at, sums, count);
    for (int64_t i = 0; i < count; ++i) {
      const T sum = sums[i];
      const Element& e = elements[i];
      if (sum != sum) {
        dw[e.at] =
            convert<S>(reference::grad_weight_element<double, S>(params, ci, e.co, e.kh, e.kw));
      } else if (!together) {
        dw[e.at] = convert<S>(sum);
      }
    }
  }
};

template <class S>
void weight_gemm(const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const WeightGemm<S> gemm(params);
  const int64_t parts = gemm.parts(), elements = gemm.part_elements(), splits = gemm.splits;
  if (splits == 1) {
    parallel_for(parts, threads, [&](int64_t index) {
      const auto part = gemm.part_of(index);
      const T* sums = gemm.accumulate(part, 0, gemm.blocks, nullptr);
      in_phase(Phase::kStore, [&] { gemm.store(part, sums); });
    });
    return;
  }
  T* sums = static_cast<T*>(
      call_scratch(parts * splits * elements * sizeof(T)));  // [part][split][rows][lanes]
  parallel_for(parts * splits, threads, [&](int64_t task) {
    const int64_t split = task % splits;
    gemm.accumulate(gemm.part_of(task / splits), gemm.blocks * split / splits,
                    gemm.blocks * (split + 1) / splits, sums + task * elements);
  });
  parallel_for(parts, threads, [&](int64_t part) {
    in_phase(Phase::kStore, [&] {
      T* total = sums + part * splits * elements;
      for (int64_t split = 1; split < splits; ++split)
        for (int64_t i = 0; i < elements; ++i) total[i] += total[split * elements + i];
      gemm.store(gemm.part_of(part), total);
    });
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
