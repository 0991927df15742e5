// "gemm" for grad_weight in bfloat16 (weight_parts.h) by instructions that multiply pairs, here of
// pixels, with the tiles of Format: Amx (amx.h) or Dot (dot.h).
//
// Pixels that a tap reads have to follow each other, so a patch of dy is split into classes: of
// each axis, outputs with the same remainder modulo the stride. In its class a tap is a shift:
//
//     dy[i * stride + o] = class (o mod stride) [i + floor(o / stride)]    o = k * dilation - pad
//
// A class is an image of `pitch` elements a line, and x is packed with the same pitch and zeros
// between its lines. So a strip of lines is one sum, whose row of A begins at the shift. Rows of a
// tile are co of one tap, or any (co, tap) where these would leave it empty. Tiles of B are pairs
// of pixels of some ci.
#pragma once

#include "pair_tiles.h"
#include "weight_parts.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// Classes of one axis for the taps of a chunk. Where most of a class would not be read (dilation,
// fewer taps than strides) each tap is a class of its own.
struct PatchClasses {
  int64_t count, extent;
  bool by_tap;

  static PatchClasses make(const Axis& axis, int64_t pixels, int64_t taps) {
    int64_t range = 0;  // of the shifts, whichever tap is first
    for (int64_t first = 0; first < axis.kernel; first += taps) {
      const int64_t last = min_of(first + taps, axis.kernel) - 1;
      range = max_of(range, line_of(axis, last) - line_of(axis, first));
    }
    if (axis.stride * (pixels + range) <= taps * pixels)
      return {axis.stride, pixels + range, false};
    return {taps, pixels, true};
  }

  static int64_t offset(const Axis& axis, int64_t tap) { return tap * axis.dilation - axis.pad; }
  static int64_t line_of(const Axis& axis, int64_t tap) {
    return floor_div(offset(axis, tap), axis.stride);
  }

  int64_t class_of(const Axis& axis, int64_t first_tap, int64_t tap) const {
    return by_tap ? tap
                  : offset(axis, first_tap + tap) - line_of(axis, first_tap + tap) * axis.stride;
  }
  int64_t shift_of(const Axis& axis, int64_t first_tap, int64_t tap) const {
    return by_tap ? 0 : line_of(axis, first_tap + tap) - line_of(axis, first_tap);
  }
  // The output that the first element of a class holds; the next are a stride away. May lie
  // outside dy.
  int64_t output(const Axis& axis, int64_t first_pixel, int64_t first_tap, int64_t index) const {
    return first_pixel * axis.stride + (by_tap ? offset(axis, first_tap + index)
                                               : line_of(axis, first_tap) * axis.stride + index);
  }
};

template <class Format>
bool pairs_take_weight(const Params& params) {
  const Problem& p = params.problem;
  return params.dtype == Dtype::kBFloat16 &&
         Format::takes_weight(p.c_out / p.groups, p.c_in / p.groups);
}

template <class Format>
struct WeightPairs : WeightParts<BFloat16> {
  Tile<float> tile;
  decltype(PairTile::multiply_strips) multiply_strips;
  PatchClasses patch_h, patch_w;
  int64_t row_unit;  // of co

  explicit WeightPairs(const Params& given) : WeightParts(given) {
    const int64_t taps = p.h.kernel * p.w.kernel;
    // Rows of one tap leave tiles partly empty, but co lie together in dy. Any rows have to save
    // some.
    constexpr double kSaved = 1.25;
    bool any_rows = false;
    double least = 0;
    for (const bool any : {false, true})
      for (const PairTile& t : Format::kTiles) {
        if (any && !Format::kAnyRows) continue;
        const int64_t rows = any ? ceil_div(group_out * taps, t.tile.rows)
                                 : ceil_div(group_out, t.tile.rows) * taps,
                      lanes = ceil_div(group_in, t.tile.vectors * kLanes<float>);
        const double cycles = Format::cycles_per_step(t.tile.rows, t.tile.vectors) *
                              static_cast<double>(rows * lanes);
        if (least != 0 && cycles * (any && !any_rows ? kSaved : 1.0) >= least) continue;
        least = cycles;
        any_rows = any;
        tile = t.tile;
        multiply_strips = t.multiply_strips;
      }
    taps_outer = !any_rows;
    row_unit = any_rows ? 1 : tile.rows;
    choose_lanes(tile.vectors * kLanes<float>, sizeof(BFloat16), 2);
    choose_chunks(row_unit, any_rows ? tile.rows : 0);
    constexpr int64_t kPatches = kPatchBytes / sizeof(BFloat16);
    choose_lines(kBlockPixels, [&] {
      patch_h = PatchClasses::make(p.h, min_of(lines, p.h.in), kernel_h);
      patch_w = PatchClasses::make(p.w, line, kernel_w);
      return patch_pitch() * min_of<int64_t>(tile.rows, outputs) <= kPatches;
    });
    patch_outputs =
        min_of(outputs, max_of<int64_t>(1, kPatches / (patch_pitch() * row_unit)) * row_unit);
    patch_rows = round_up<int64_t>(patch_outputs * kernel_h * kernel_w, tile.rows);
  }

  // Pairs do not cross lines.
  int64_t pitch() const { return round_up<int64_t>(patch_w.extent, 2); }
  int64_t class_elements() const { return patch_h.extent * pitch(); }
  int64_t strip_elements() const { return patch_h.count * patch_w.count * class_elements(); }
  // From one co's patches to the next. A shifted strip, rounded up to tiles, ends beyond its class.
  int64_t patch_pitch() const {
    return odd_lines(images() * strip_elements() + pitch() + 2 * Format::kUnit, sizeof(BFloat16));
  }
  int64_t pairs_of(int64_t strip_lines) const {
    return round_up(strip_lines * pitch() / 2, Format::kUnit);
  }

  // As that of WeightGemm, in rows (k, co).
  float* accumulate(const Part& part, int64_t begin, int64_t end, float* sums) const {
    [[maybe_unused]] const typename Format::Session session{};
    float *own_sums, *packed_x;
    BFloat16* patches;
    Strip* strips;
    PairStrip* operands;
    int64_t* places;
    // Of a tile of lanes; each strip may end with a part of a tile.
    const int64_t tile_pairs = lines * pitch() / 2 + images() * Format::kUnit;
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      own_sums = carver.take<float>(sums ? 0 : part_elements());
      packed_x = carver.take<float>(lane_tiles * tile_pairs * width);
      patches = carver.take<BFloat16>(patch_outputs * patch_pitch());
      strips = carver.take<Strip>(images());
      operands = carver.take<PairStrip>(images());
      places = carver.take<int64_t>(patch_rows);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    if (!sums) sums = own_sums;
    // What is multiplied with zeros has to be a number, or elements are computed again.
    clear(patches, patch_outputs * patch_pitch());
    list_rows(part, places);
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(index, strips);
      in_phase(Phase::kPack, [&] {
        for (int64_t t = 0; t * width < part.lanes; ++t) {
          float* to = packed_x + t * tile_pairs * width;
          for (int64_t s = 0; s < block.strips; ++s) {
            pack_pairs(part, strips[s], t, block, to);
            to += pairs_of(strips[s].lines) * width;
          }
        }
      });
      for (int64_t o = 0; o < part.outputs; o += patch_outputs) {
        const int64_t count = min_of(patch_outputs, part.outputs - o);
        in_phase(Phase::kPack, [&] {
          for (int64_t s = 0; s < block.strips; ++s)
            for (int64_t co = 0; co < count; co += kOutputsTogether)
              pack_classes(part, strips[s], o + co, min_of(kOutputsTogether, count - co), block.iw,
                           patches + co * patch_pitch() + s * strip_elements());
        });
        in_phase(Phase::kProduct, [&] {
          float* block_sums = sums + o / patch_outputs * patch_rows * lane_tiles * width;
          for (int64_t row = 0; row < patch_rows; row += tile.rows) {
            const int64_t first_co =
                taps_outer ? row % patch_outputs : row / (part.kernel_h * part.kernel_w);
            if (first_co >= count) continue;
            for (int64_t t = 0; t * width < part.lanes; ++t) {
              const float* b = packed_x + t * tile_pairs * width;
              for (int64_t s = 0; s < block.strips; ++s) {
                const int64_t pairs = pairs_of(strips[s].lines);
                operands[s] = {patches + s * strip_elements(), b, pairs};
                b += pairs * width;
              }
              multiply_strips(operands, block.strips, places + row,
                              block_sums + row * lane_tiles * width + t * width, lane_tiles * width,
                              index > begin);
            }
          }
        });
      }
    }
    return sums;
  }

  // Where the rows begin in the patches. Those that only fill the last tile have any place.
  void list_rows(const Part& part, int64_t* places) const {
    for (int64_t row = 0; row < patch_rows; ++row) places[row] = 0;
    for (int64_t kh = 0; kh < part.kernel_h; ++kh)
      for (int64_t kw = 0; kw < part.kernel_w; ++kw) {
        const int64_t tap = place_of(part, kh, kw);
        for (int64_t co = 0; co < patch_outputs; ++co)
          places[row_of(part, co, kh, kw)] = tap + co * patch_pitch();
      }
  }

  // Where a tap begins in a patch.
  int64_t place_of(const Part& part, int64_t kh, int64_t kw) const {
    const int64_t h = patch_h.class_of(p.h, part.kh, kh), w = patch_w.class_of(p.w, part.kw, kw);
    return (h * patch_w.count + w) * class_elements() +
           patch_h.shift_of(p.h, part.kh, kh) * pitch() + patch_w.shift_of(p.w, part.kw, kw);
  }

  // A strip of x for one tile of lanes: [pair of pixels][width], zeros between lines.
  DECONV_PHASE void pack_pairs(const Part& part, const Strip& strip, int64_t t, const Block& block,
                               float* to) const {
    // Lines without zeros between them may be one.
    const int64_t joined = joins_lines() && pitch() == block.length ? strip.lines : 1,
                  length = joined * block.length, pairs = length / 2, rest = length % 2,
                  line_pairs = joined * pitch() / 2;
    const int64_t lanes = min_of(width, part.lanes - t * width);
    float* const end = to + pairs_of(strip.lines) * width;
    if (lanes < width) clear(to, end - to);
    const int64_t channel = params.x.stride[1], pixel = params.x.stride[3];
    for (int64_t l = 0; l < strip.lines; l += joined, to += line_pairs * width) {
      const BFloat16* from = x_line(part, strip.n, t, strip.ih + l, block.iw);
      if (channel == 1) {
        for (int64_t i = 0; i < pairs; ++i)
          copy_every<1>(to + i * width, PairRows{from + 2 * i * pixel, pixel}, lanes, lanes);
      } else if (pixel == 1 && channel % 2 == 0) {
        transpose(reinterpret_cast<const float*>(from), channel / 2, lanes, pairs, to, width);
      } else {
        for (int64_t lane = 0; lane < lanes; ++lane)
          for (int64_t i = 0; i < pairs; ++i)
            to[i * width + lane] =
                convert<float>(PairRows{from + lane * channel + 2 * i * pixel, pixel}[0]);
      }
      clear(to + pairs * width, (line_pairs - pairs) * width);
      if (rest > 0)
        for (int64_t lane = 0; lane < lanes; ++lane)
          to[pairs * width + lane] =
              convert<float>(Pair{from[lane * channel + (length - 1) * pixel], BFloat16{}});
    }
    clear(to, end - to);
  }

  // The classes of dy that the pixels of a strip and the taps of the part touch, for `count` co
  // from o on; zeros outside dy.
  DECONV_PHASE void pack_classes(const Part& part, const Strip& strip, int64_t o, int64_t count,
                                 int64_t iw, BFloat16* to) const {
    const BFloat16* from = dy_plane(part, strip.n, o);
    const int64_t extent = patch_w.extent;
    if (params.y.stride[3] == 1 && p.w.stride == 2 && !patch_w.by_tap)
      return pack_both_classes(part, strip, from, count, iw, to);
    for (int64_t h = 0; h < patch_h.count; ++h)
      for (int64_t w = 0; w < patch_w.count; ++w) {
        const int64_t start = patch_w.output(p.w, iw, part.kw, w);
        const auto [head, tail] = inside_dy(start, extent, p.w.stride);
        BFloat16* line_to = to + (h * patch_w.count + w) * class_elements();
        for (int64_t e = 0; e < patch_h.extent; ++e, line_to += pitch()) {
          const int64_t oh = patch_h.output(p.h, strip.ih, part.kh, h) + e * p.h.stride;
          const bool outside = oh < 0 || oh >= p.h.out || head == tail;
          for (int64_t co = 0; co < count && (outside || tail - head < extent); ++co) {
            BFloat16* row = line_to + co * patch_pitch();
            clear(row, outside ? extent : head);
            if (!outside) clear(row + tail, extent - tail);
          }
          if (outside) continue;
          copy_line(
              from + oh * params.y.stride[2] + (start + head * p.w.stride) * params.y.stride[3],
              tail - head, count, line_to + head);
        }
      }
  }

  // The same where both classes of a line are its even and its odd elements.
  void pack_both_classes(const Part& part, const Strip& strip, const BFloat16* from, int64_t count,
                         int64_t iw, BFloat16* to) const {
    constexpr int64_t kN = kLanes<float>;
    const int64_t extent = patch_w.extent, start = patch_w.output(p.w, iw, part.kw, 0),
                  begin = max_of<int64_t>(0, -start),
                  end = max_of(begin, min_of(2 * extent, p.w.out - start));
    for (int64_t h = 0; h < patch_h.count; ++h)
      for (int64_t e = 0; e < patch_h.extent; ++e) {
        const int64_t oh = patch_h.output(p.h, strip.ih, part.kh, h) + e * p.h.stride;
        const bool outside = oh < 0 || oh >= p.h.out;
        const BFloat16* line = from + oh * params.y.stride[2] + start;
        BFloat16* line_to = to + h * 2 * class_elements() + e * pitch();
        for (int64_t i = 0; i < extent; i += kN) {
          // Words of the vector that lie in dy, and elements that the classes have.
          const uint32_t words = outside ? 0
                                         : words_from(max_of<int64_t>(0, begin - 2 * i)) &
                                               ~words_from(max_of<int64_t>(0, end - 2 * i));
          const __mmask16 mask = ~words_from(extent - i);
          for (int64_t co = 0; co < count; ++co) {
            const Pairs32 both = reinterpret_cast<Pairs32>(
                _mm512_maskz_loadu_epi16(words, line + co * params.y.stride[1] + 2 * i));
            BFloat16* row = line_to + co * patch_pitch() + i;
            _mm256_mask_storeu_epi16(row, mask, low_words(both));
            _mm256_mask_storeu_epi16(row + class_elements(), mask, low_words(both >> 16));
          }
        }
      }
  }
  // All words but the first ones.
  static uint32_t words_from(int64_t first) { return first >= 32 ? 0 : ~uint32_t{0} << first; }
  typedef Vector<uint32_t> Pairs32;
  static __m256i low_words(Pairs32 pairs) {
    return reinterpret_cast<__m256i>(__builtin_convertvector(pairs, HalfWords));
  }

  // Every stride-th element of a line of dy, for `count` co.
  void copy_line(const BFloat16* dy, int64_t pixels, int64_t count, BFloat16* to) const {
    const int64_t channel = params.y.stride[1], stride = p.w.stride * params.y.stride[3];
    int64_t done = 0;  // pixels
    if (channel == 1) {
      // Pairs of pixels, which are pairs of the patch too.
      done = pixels / 2 * 2;
      transpose(PairRows{dy, stride}, 2 * stride, done / 2, count, reinterpret_cast<float*>(to),
                patch_pitch() / 2);
    }
    for (int64_t co = 0; co < count; ++co) {
      const BFloat16* from = dy + co * channel;
      BFloat16* row = to + co * patch_pitch();
      switch (channel == 1 ? 0 : stride) {
        case 1:
          done = copy_words<1>(from, pixels, row);
          break;
        case 2:
          done = copy_words<2>(from, pixels, row);
          break;
        case 4:
          done = copy_words<4>(from, pixels, row);
          break;
        case 8:
          done = copy_words<8>(from, pixels, row);
          break;
      }
      for (int64_t i = done; i < pixels; ++i) row[i] = from[i * stride];
    }
  }

  // to[i] = from[i * Stride], which is the lower half of a pair if there is a stride. Returns how
  // many were copied: all, or but the last one, whose upper half may not be there.
  template <int Stride>
  static int64_t copy_words(const BFloat16* from, int64_t count, BFloat16* to) {
    constexpr int64_t kN = kLanes<float>;
    const int64_t copied = Stride <= 2 ? count : count - 1;
    for (int64_t i = 0; i < copied; i += kN, from += kN * Stride) {
      const int64_t some = min_of(kN, copied - i);
      const __mmask16 mask = (1u << some) - 1;
      __m256i words;
      if constexpr (Stride == 1) {
        words = _mm256_maskz_loadu_epi16(mask, from);
      } else {
        Pairs32 pairs;
        if constexpr (Stride == 2) {
          pairs =
              reinterpret_cast<Pairs32>(_mm512_maskz_loadu_epi16((1u << (2 * some - 1)) - 1, from));
        } else {
          pairs = reinterpret_cast<Pairs32>(load_every<float, Stride / 2>(
              reinterpret_cast<const float*>(from), (some - 1) * (Stride / 2) + 1));
        }
        words = low_words(pairs);
      }
      _mm256_mask_storeu_epi16(to + i, mask, words);
    }
    return copied;
  }
};

template <class Format>
void weight_pairs(const Params& params, int threads) {
  run_weight_product(WeightPairs<Format>(params), threads);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
