// Packing the weights of the gather product (gather_gemm.h), once a call.
#pragma once

#include "gather.h"
#include "scratch.h"
#include "shuffle.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// T: elements of the panel. Source: pointer to what is packed.
template <class T, class Source>
struct GatherWeights {
  const GatherPlan& plan;
  Source data;
  T* packed;

  // Where the channels from c0 on of one chunk are.
  T* panel_of(int64_t group, int64_t chunk, int64_t c0) const {
    return packed +
           ((group * plan.row_chunks + chunk) * plan.channels + c0) * plan.weights_per_channel;
  }

  static constexpr int64_t kScatter =
      512;  // kernel elements handled at a time: as many places are written to in turn

  // Packs the channels [c0, c0 + channels) of one chunk. The source is read in its own order, one
  // channel after the other: every kernel element has one place in the packed panel.
  DECONV_PHASE void pack(int64_t group, int64_t chunk, int64_t c0, int64_t channels) const {
    const int64_t first = chunk * plan.row_chunk, rows = min_of(plan.row_chunk, plan.rows - first);
    T* panel = panel_of(group, chunk, c0);
    if (plan.padded_weights || rows < plan.row_chunk)
      clear(panel, channels * plan.weights_per_channel);
    const Source source =
        data + (group * plan.weight.group + c0 * plan.weight.channel + first * plan.weight.row);

    if (plan.weight_at(1, 0) != 1) {
      if (kernel_contiguous() || plan.weight.channel == 1)
        return pack_by_channels(source, rows, channels, panel);
    } else if (vectorizable()) {
      return pack_by_vectors(source, rows, channels, panel);
    }
    switch (piece()) {
      case 2:
        return pack_by_pieces<2>(source, rows, channels, panel);
      case 4:
        return pack_by_pieces<4>(source, rows, channels, panel);
    }
    pack_by_pieces<1>(source, rows, channels, panel);
  }

  // Kernel elements that lie together in the weight as in the panel: those of phases that have one
  // tap each, the same for all.
  int64_t piece() const {
    if (plan.w.classes.size() != 1 || plan.rows_by_phase || plan.weight.kernel_w != 1 ||
        plan.weight_at(1, 0) != 1)
      return 1;
    const PhaseClass& w = plan.w.classes.front();
    if (w.offsets.size() != 1 || plan.row_width % w.phases != 0) return 1;
    for (int64_t i = 0; i < w.phases; ++i)
      if (w.k[i] < 0 || w.k[i] != w.k[0] + i) return 1;
    return w.phases;
  }

  template <int Piece>
  DECONV_PHASE void pack_by_pieces(Source source, int64_t rows, int64_t channels, T* panel) const {
    int64_t from[kScatter], to[kScatter];
    int64_t count = 0;
    const auto flush = [&] {
      for (int64_t c = 0; c < channels; ++c) {
        const Source x = source + c * plan.weight.channel;
        T* y = panel + plan.weight_at(0, c);
        for (int64_t i = 0; i < count; ++i)
          for (int j = 0; j < Piece; ++j) y[to[i] + j] = convert<T>(x[from[i] + j]);
      }
      count = 0;
    };
    for (const GatherClass& g : plan.classes)
      for (int64_t row = 0; row < rows; ++row)
        for_each_place(g, rows, row, channels, [&](int64_t kh, int64_t kw, int64_t place) {
          if (Piece > 1 && kw != plan.w.classes[g.w].k[0]) return;
          from[count] =
              row * plan.weight.row + kh * plan.weight.kernel_h + kw * plan.weight.kernel_w;
          to[count] = place;
          if (++count == kScatter) flush();
        });
    flush();
  }

  // Calls f(kh, kw, place) for every kernel element of a row that a class uses, with the place of
  // its first channel in the panel.
  template <class F>
  void for_each_place(const GatherClass& g, int64_t rows, int64_t row, int64_t channels,
                      const F& f) const {
    const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
    const int64_t taps_h = h.offsets.size(), taps_w = w.offsets.size();
    for (int64_t rh = 0; rh < h.phases; ++rh)
      for (int64_t rw = 0; rw < w.phases; ++rw) {
        const int64_t local = plan.row_of(h, w, rows, row, rh, rw);
        const int64_t base =
            channels * (g.first_weight + local / plan.row_width * plan.row_width * g.taps) +
            plan.weight_at(local % plan.row_width, 0);
        for (int64_t th = 0; th < taps_h; ++th)
          for (int64_t tw = 0; tw < taps_w; ++tw) {
            const int64_t kh = h.k[rh * taps_h + th], kw = w.k[rw * taps_w + tw];
            if (kh >= 0 && kw >= 0)
              f(kh, kw, base + (th * taps_w + tw) * channels * plan.row_width);
          }
      }
  }

  // One phase a class, so that neighbouring rows are neighbouring lanes, and some axis of the
  // weight contiguous: whole vectors are moved.
  bool vectorizable() const {
    bool single = true;
    for (const PhaseClass& c : plan.h.classes) single &= c.phases == 1;
    for (const PhaseClass& c : plan.w.classes) single &= c.phases == 1;
    return single && (kernel_contiguous() || plan.weight.channel == 1 || plan.weight.row == 1);
  }
  bool kernel_contiguous() const {
    return plan.weight.kernel_w == 1 && plan.weight.kernel_h == plan.params.problem.w.kernel;
  }

  DECONV_PHASE void pack_by_vectors(Source source, int64_t rows, int64_t channels, T* panel) const {
    constexpr int64_t kN = kLanes<T>;
    // Where a kernel element goes: its first tile of rows, and how far the next tile is. Elements
    // without an input have no place.
    struct Place {
      int64_t first, next_tile;
    };
    const int64_t elements = plan.kernel_h * plan.params.problem.w.kernel;
    Place* places = static_cast<Place*>(thread_scratch(elements * sizeof(Place)));
    for (int64_t k = 0; k < elements; ++k) places[k].first = -1;
    for (const GatherClass& g : plan.classes) {
      const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
      const int64_t taps_w = w.offsets.size();
      for (int64_t tap = 0; tap < g.taps; ++tap)
        places[h.k[tap / taps_w] * plan.params.problem.w.kernel + w.k[tap % taps_w]] = {
            channels * (g.first_weight + tap * plan.row_width), channels * g.taps * plan.row_width};
    }
    // A few channels, then their next rows: channels lie far apart, often a power of two, and would
    // push each other out of the cache before the rest of a line is used.
    for (int64_t c = 0; c < channels; c += kN)
      for (int64_t tile = 0; tile * plan.row_width < rows; ++tile) {
        const int64_t row = tile * plan.row_width;
        for (int64_t lane = 0; lane < min_of(plan.row_width, rows - row); lane += kN)
          pack_rows(source, row + lane,
                    min_of(min_of(kN, plan.row_width - lane), rows - row - lane), c,
                    min_of(kN, channels - c), channels,
                    [&](int64_t k, int64_t channel, Vector<T> v, int64_t count) {
                      if (places[k].first >= 0)
                        store_first(panel + places[k].first + tile * places[k].next_tile +
                                        channel * plan.row_width + lane,
                                    v, count);
                    });
      }
  }

  // Calls put(kernel element, channel, vector of `count` rows) for the rows from `row` and the
  // channels [c0, c0 + some) on, at most kLanes each; `channels` there are in all.
  template <class Put>
  DECONV_INLINE void pack_rows(Source source, int64_t row, int64_t count, int64_t c0, int64_t some,
                               int64_t channels, const Put& put) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t kernel_w = plan.params.problem.w.kernel, elements = plan.kernel_h * kernel_w;
    const Source from = source + row * plan.weight.row;
    // A square of rows times the contiguous axis, `left` elements of it, transposed.
    const auto load_square = [&](Source corner, int64_t left, Vector<T>* square) {
      for (int64_t i = 0; i < kN; ++i)
        square[i] = i < count ? load_every<T, 1>(corner + i * plan.weight.row, left) : Vector<T>{};
      transpose_step<T, kN / 2>(square);
    };
    Vector<T> square[kN];
    constexpr int64_t kFew = 4;  // elements of a kernel of 2 x 2
    if (kernel_contiguous() && elements == kFew && plan.weight.row == kFew && count == kN) {
      for (int64_t c = c0; c < c0 + some; ++c) {
        for (int64_t k = 0; k < kFew; ++k)
          square[k] = load_as<T>(from + c * plan.weight.channel + k * kN);
        split_residues<T, kFew>(square);
        for (int64_t k = 0; k < kFew; ++k) put(k, c, square[k], count);
      }
      return;
    }
    if (kernel_contiguous()) {
      for (int64_t c = c0; c < c0 + some; ++c)
        for (int64_t k = 0; k < elements; k += kN) {
          load_square(from + c * plan.weight.channel + k, elements - k, square);
          for (int64_t j = 0; j < min_of(kN, elements - k); ++j) put(k + j, c, square[j], count);
        }
      return;
    }
    for (int64_t k = 0; k < elements; ++k) {
      const Source element =
          from + k / kernel_w * plan.weight.kernel_h + k % kernel_w * plan.weight.kernel_w;
      if (plan.weight.row == 1) {
        for (int64_t c = c0; c < c0 + some; ++c)
          put(k, c, load_every<T, 1>(element + c * plan.weight.channel, count), count);
        continue;
      }
      load_square(element + c0, channels - c0, square);
      for (int64_t j = 0; j < some; ++j) put(k, c0 + j, square[j], count);
    }
  }

  // Channels of a row lie together in the panel (plan.weight_at): vectors of channels are moved.
  DECONV_PHASE void pack_by_channels(Source source, int64_t rows, int64_t channels,
                                     T* panel) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t kernel_w = plan.params.problem.w.kernel, elements = plan.kernel_h * kernel_w;
    int64_t* places = static_cast<int64_t*>(thread_scratch(elements * sizeof(int64_t)));
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t k = 0; k < elements; ++k) places[k] = -1;  // no input
      for (const GatherClass& g : plan.classes)
        for_each_place(g, rows, row, channels, [&](int64_t kh, int64_t kw, int64_t place) {
          places[kh * kernel_w + kw] = place;
        });
      const Source from = source + row * plan.weight.row;
      for (int64_t c = 0; c < channels; c += kN) {
        T* to = panel + plan.weight_at(0, c);
        const auto put = [&](int64_t k, Vector<T> v) {
          if (places[k] >= 0) store_vector(to + places[k], v);
        };
        if (plan.weight.channel == 1) {
          for (int64_t k = 0; k < elements; ++k)
            put(k, load_as<T>(from + (c + k / kernel_w * plan.weight.kernel_h +
                                      k % kernel_w * plan.weight.kernel_w)));
          continue;
        }
        for (int64_t k = 0; k < elements; k += kN) {
          Vector<T> square[kN];
          for (int64_t i = 0; i < kN; ++i)
            square[i] = load_every<T, 1>(from + ((c + i) * plan.weight.channel + k), elements - k);
          transpose_step<T, kN / 2>(square);
          for (int64_t j = 0; j < min_of(kN, elements - k); ++j) put(k + j, square[j]);
        }
      }
    }
  }
};

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
