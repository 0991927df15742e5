// "gemm" for grad_weight in registers (weight_parts.h). x is packed transposed, [pixel][ci]; dy is
// not multiplied out by taps: a padded patch of it is copied, and the tile reads row (co, k) of the
// patch with the stride of the problem.
#pragma once

#include "weight_parts.h"

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
struct WeightGemm : WeightParts<S> {
  using Base = WeightParts<S>;
  using Base::group_in, Base::group_out, Base::images, Base::kernel_h, Base::kernel_w,
      Base::lane_tiles, Base::line, Base::lines, Base::outputs, Base::p, Base::params,
      Base::part_elements, Base::patch_outputs, Base::patch_rows, Base::row_of, Base::width;
  using typename Base::Block;
  using typename Base::Part;
  using typename Base::Strip;
  using typename Base::T;

  Tile<T> tile;
  PatchAxis patch_h, patch_w;

  explicit WeightGemm(const Params& given) : Base(given) {
    choose_tile();
    this->choose_lanes(tile.vectors * kLanes<T>, sizeof(T), 1);
    this->choose_chunks(1, tile.rows);
    choose_patches();
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
  }

  void choose_patches() {
    const int64_t together = params.y.stride[1] != 1                ? 1
                             : outputs < 2 * Base::kOutputsTogether ? outputs
                                                                    : Base::kOutputsTogether;
    constexpr int64_t kPatches = Base::kPatchBytes / sizeof(T);
    this->choose_lines(kPartialSum, [&] {
      patch_h = PatchAxis::make(p.h, min_of(lines, p.h.in), kernel_h);
      patch_w = PatchAxis::make(p.w, line, kernel_w);
      return patch_pitch() * together <= kPatches;
    });

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

  // From one co's patches to the next.
  int64_t patch_pitch() const {
    return odd_lines(images() * patch_h.extent * patch_w.extent, sizeof(T));
  }

  // Sums over the blocks [begin, end) as [row][lane], rows (co, kh, kw) in groups of patch_rows;
  // into `sums`, or if that is null into the thread's scratch. Returns where they are.
  T* accumulate(const Part& part, int64_t begin, int64_t end, T* sums) const {
    T *own_sums, *packed_x, *patches;
    Strip* strips;
    SegmentList segments;
    TileTask<T>* tasks;
    int64_t* row_offsets;
    const int64_t pixels = lines * line, pitch = patch_pitch();
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
    for (int64_t index = begin; index < end; ++index) {
      const Block block = this->block_of(index, strips);
      const int64_t length = block.length;
      in_phase(Phase::kPack, [&] {
        for (int64_t t = 0; t * width < part.lanes; ++t) {
          T* to = packed_x + t * pixels * width;
          for (int64_t s = 0; s < block.strips; ++s) {
            const Strip& strip = strips[s];
            const int64_t joined = this->joins_lines() ? strip.lines : 1;
            for (int64_t l = 0; l < strip.lines; l += joined, to += joined * length * width)
              this->pack_x(part, strip.n, t, strip.ih + l, block.iw, joined * length, to);
          }
        }
      });
      for (int64_t o = 0; o < part.outputs; o += patch_outputs) {
        const int64_t count = min_of(patch_outputs, part.outputs - o),
                      rows = count * part.kernel_h * part.kernel_w;
        in_phase(Phase::kPack, [&] {
          for (int64_t s = 0; s < block.strips; ++s)
            pack_patch(part, strips[s], o, count, block.iw,
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
        for (int64_t s = 0; s < block.strips; ++s)
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
                                       {lane_tiles * width},
                                       tile.rows,
                                       index > begin,
                                       {nullptr}}};
            tile.panel_b(segments, tasks, count_tasks);
          }
        });
      }
    }
    return sums;
  }

  // The patches of dy that the pixels of a strip and the taps of the part touch, for `count` co
  // from o on; zeros outside dy. Planes of dy one after the other, unless channels lie together.
  DECONV_PHASE void pack_patch(const Part& part, const Strip& strip, int64_t o, int64_t count,
                               int64_t iw, T* to) const {
    const S* from = this->dy_plane(part, strip.n, o);
    const int64_t together = params.y.stride[1] == 1 ? count : 1;
    for (int64_t co = 0; co < count; co += together)
      pack_together(part, strip, together, iw, from + co * params.y.stride[1],
                    to + co * patch_pitch());
  }
  void pack_together(const Part& part, const Strip& strip, int64_t count, int64_t iw, const S* from,
                     T* to) const {
    const int64_t strip_lines = min_of(lines, p.h.in), extent = patch_w.extent,
                  pitch = patch_pitch();
    // A row of a patch is one piece of dy, or one a tap.
    const int64_t pieces = patch_w.by_tap ? part.kernel_w : 1,
                  length = patch_w.by_tap ? line : extent, step = patch_w.by_tap ? p.w.stride : 1,
                  stride = step * params.y.stride[3];
    // Rows that are rows of dy without a gap are one.
    const bool dense = !patch_h.by_tap && !patch_w.by_tap && extent == p.w.out &&
                       patch_w.output(p.w, iw, part.kw, line, 0) == 0 &&
                       params.y.stride[2] == p.w.out * params.y.stride[3];
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const int64_t start = patch_w.output(p.w, iw, part.kw, line, piece * length);
      const auto [head, tail] = this->inside_dy(start, length, step);
      for (int64_t eh = 0, rows; eh < patch_h.extent; eh += rows) {
        const int64_t oh = patch_h.output(p.h, strip.ih, part.kh, strip_lines, eh);
        const bool inside = head < tail && oh >= 0 && oh < p.h.out;
        rows = dense && inside ? min_of(patch_h.extent - eh, p.h.out - oh) : 1;
        const int64_t more = (rows - 1) * extent, first = inside ? head : 0,
                      last = inside ? tail + more : 0;
        T* row = to + eh * extent + piece * length;
        for (int64_t co = 0; co < count; ++co) {
          clear(row + co * pitch, first);
          clear(row + co * pitch + last, length + more - last);
        }
        if (!inside) continue;
        const S* dy = from + oh * params.y.stride[2] + start * params.y.stride[3] + head * stride;
        if (count > 1) {
          transpose(dy, stride, last - first, count, row + first, pitch);
        } else {
          copy_strided(row + first, dy, stride, last - first);
        }
      }
    }
  }
};

template <class S>
void weight_gemm(const Params& params, int threads) {
  run_weight_product(WeightGemm<S>(params), threads);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
