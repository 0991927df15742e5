// What the matrix products for grad_weight share, whatever multiplies (weight_gemm.h,
// weight_pairs.h):
//
//     dw[ci, co, k] = sum over n, i of x[n, ci, i] * dy[n, co, i * stride + k * dilation - pad]
//
// Rows (co, k) times lanes ci, summed over pixels:
//
//   for each chunk of (co, k) x lanes of ci x split of the pixels, in parallel:
//     for each block of pixels (lines of images):
//       pack x
//       for a few co at a time: pack patches of dy, multiply
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

template <class S>
struct WeightParts {
  using T = typename Arithmetic<S>::type;

  // A thread's working set in its L2 cache: sums, packed x, patches of dy.
  static constexpr int64_t kSums = (512 << 10) / sizeof(T), kPatchBytes = 128 << 10;
  // co whose patches are packed together where they lie together in dy: a cache line.
  static constexpr int64_t kOutputsTogether = 64 / sizeof(S);
  static constexpr int64_t kBlockPixels = 256;  // packed at a time
  static constexpr int64_t kTasks =
      16;  // enough to balance a few threads; pixels are split where the weight has fewer parts

  const Params& params;
  const Problem& p = params.problem;
  int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;
  int64_t width, lane_tiles, lane_parts;  // lanes of a tile; tiles of lanes in a part; parts
  int64_t outputs, kernel_h, kernel_w;    // co, kh, kw of a chunk
  int64_t chunks_o, chunks_h, chunks_w;   // their numbers
  int64_t patch_outputs,
      patch_rows;  // co whose patches are packed together; their rows (co, k), padded to tiles
  bool taps_outer = false;                          // the order of rows
  int64_t line, line_parts, lines, blocks, splits;  // pixels a line, lines across an image row,
                                                    // lines a block, blocks, splits of the blocks

  explicit WeightParts(const Params& given) : params(given) {}

  // With L lanes in a part, dy is packed ci / L times, and x once for each chunk of rows, co * taps
  // * L / kSums times. dy has co * stride^2 elements for ci of x, each of which takes `dy_cost`
  // times as long. So all of that is least at L = sqrt(dy_cost * stride^2 * kSums / taps). Packed x
  // has to stay in the cache, too.
  void choose_lanes(int64_t tile_lanes, int64_t x_bytes, int64_t dy_cost) {
    constexpr int64_t kLeast = 192, kStep = 32, kPackedX = 256 << 10;
    const int64_t square = dy_cost * p.h.stride * p.w.stride * kSums / (p.h.kernel * p.w.kernel),
                  most = kPackedX / (kBlockPixels * x_bytes);
    int64_t at_once = kLeast;
    while (at_once + kStep <= most && (at_once + kStep) * (at_once + kStep) <= square)
      at_once += kStep;
    width = tile_lanes;
    const int64_t tiles = (group_in + width - 1) / width;
    lane_parts = (tiles * width + at_once - 1) / at_once;
    lane_tiles = (tiles + lane_parts - 1) / lane_parts;
    lane_parts = (tiles + lane_tiles - 1) / lane_tiles;
  }

  // Rows whose sums fit: several co with all taps, or a part of the taps of `unit` co, of which a
  // chunk has a multiple. Padding takes up to `padding` rows.
  void choose_chunks(int64_t unit, int64_t padding) {
    const int64_t rows = max_of(unit, kSums / (lane_tiles * width) - padding) / unit;
    kernel_w = min_of(p.w.kernel, rows);
    kernel_h = min_of(p.h.kernel, max_of<int64_t>(1, rows / kernel_w));
    const bool whole = kernel_h == p.h.kernel && kernel_w == p.w.kernel;
    outputs = whole ? max_of<int64_t>(1, rows / (kernel_h * kernel_w)) * unit : unit;
    outputs = min_of(outputs, round_up(group_out, unit));
    chunks_w = (p.w.kernel + kernel_w - 1) / kernel_w;
    chunks_h = (p.h.kernel + kernel_h - 1) / kernel_h;
    chunks_o = (group_out + outputs - 1) / outputs;
    outputs = round_up((group_out + chunks_o - 1) / chunks_o, unit);
    chunks_o = (group_out + outputs - 1) / outputs;
  }

  // Lines of at most `most` pixels, as many as fit(), which sees `line` and `lines`, allows.
  template <class Fit>
  void choose_lines(int64_t most, const Fit& fit) {
    line_parts = (p.w.in + most - 1) / most;
    line = (p.w.in + line_parts - 1) / line_parts;
    lines = min_of(max_of<int64_t>(1, kBlockPixels / line), p.batch * p.h.in);
    while (!fit() && (lines > 1 || line > 1)) {
      if (lines > 1) {
        lines = (lines + 1) / 2;
      } else {
        line = (line + 1) / 2;
        line_parts = (p.w.in + line - 1) / line;
      }
    }
    blocks = line_parts * ((p.batch * p.h.in + lines - 1) / lines);
    splits = min_of(blocks, max_of<int64_t>(1, kTasks / parts()));
  }

  // A block of `lines` lines touches at most so many images; each has a patch of its own.
  int64_t images() const { return lines <= 1 ? 1 : (lines + p.h.in - 2) / p.h.in + 1; }
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

  // Where (co, kh, kw) stands among the rows of patches packed together.
  int64_t row_of(const Part& part, int64_t co, int64_t kh, int64_t kw) const {
    const int64_t tap = kh * part.kernel_w + kw;
    return taps_outer ? tap * patch_outputs + co : co * part.kernel_h * part.kernel_w + tap;
  }

  // Lines of one image within a block: they share a patch.
  struct Strip {
    int64_t n, ih, lines;
  };

  // The pixels of a block: `length` of each line from iw on.
  struct Block {
    int64_t iw, length, strips;
  };
  Block block_of(int64_t index, Strip* strips) const {
    const int64_t iw = index % line_parts * line, first = index / line_parts * lines,
                  count = min_of(lines, p.batch * p.h.in - first);
    int64_t strip_count = 0;
    for (int64_t l = 0; l < count; l += strips[strip_count++].lines) {
      const int64_t ih = (first + l) % p.h.in;
      strips[strip_count] = {(first + l) / p.h.in, ih, min_of(p.h.in - ih, count - l)};
    }
    return {iw, min_of(line, p.w.in - iw), strip_count};
  }

  // Pixel iw of a line of x, for the first channel of a tile of lanes.
  const S* x_line(const Part& part, int64_t n, int64_t t, int64_t ih, int64_t iw) const {
    return static_cast<const S*>(params.x.data) +
           params.x.at(n, part.group * group_in + part.ci + t * width, ih, iw);
  }
  // The o-th co of a part.
  const S* dy_plane(const Part& part, int64_t n, int64_t o) const {
    return static_cast<const S*>(params.y.data) +
           params.y.at(n, part.group * group_out + part.co + o, 0, 0);
  }
  // Which of `length` elements of a line of dy, the first at `start` and each `step` behind the one
  // before, dy has.
  Range inside_dy(int64_t start, int64_t length, int64_t step) const {
    if (start >= p.w.out) return {0, 0};
    const int64_t end = min_of(length, (p.w.out - 1 - start) / step + 1);
    return {min_of(end, start < 0 ? ceil_div(-start, step) : 0), end};
  }

  // Whether the lines of a strip follow each other in x without a gap.
  bool joins_lines() const {
    return line == p.w.in && params.x.stride[2] == p.w.in * params.x.stride[3];
  }

  // One line of x, or several without a gap, for one tile of lanes: [pixel][width], zeros beyond
  // the last channel.
  DECONV_PHASE void pack_x(const Part& part, int64_t n, int64_t t, int64_t ih, int64_t iw,
                           int64_t length, T* to) const {
    const int64_t lanes = min_of(width, part.lanes - t * width);
    const S* from = x_line(part, n, t, ih, iw);
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
    if (together) {
      store_first_as(dw + elements[0].at, sums, count);
      if (!any_lane<T>(sums != sums)) return;
    }
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

// Gemm is a WeightParts that has accumulate(part, first block, last block, sums), which returns
// where the sums are: in its scratch if none are given.
template <class Gemm>
void run_weight_product(const Gemm& gemm, int threads) {
  using T = typename Gemm::T;
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
