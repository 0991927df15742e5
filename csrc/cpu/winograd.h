// "winograd": forward and grad_input by Winograd's short filters (winograd_taps.h) in both
// directions. Four results that lie next to each other in a phase, 2 x 2, are computed together:
//
//     pixels    value[u] = sum of up to four pixels of the source
//     weights   weight[e] = sum of up to nine kernel elements
//     product   sum[class] += value * weight, of each phase up to 4 x 4 classes
//     results   y[2 x 2] = sums of sum[class]
//
// The product is that of "gemm" (gather_gemm.h); what is packed before it and added after it is
// here. Two taps in both directions take 9 products instead of 16, three 16 instead of 36.
//
// What overflows or is infinite comes out of such sums as infinite or NaN; it is computed again
// from the definition.
#pragma once

#include <vector>

#include "gather_gemm.h"
#include "shuffle.h"
#include "winograd_plan.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

template <class S, class T>
struct WinogradPixels : GatherPixels<T, const S*> {
  using Base = GatherPixels<T, const S*>;
  using Base::data;
  using Base::plan;
  const WinogradAxis &h, &w;

  WinogradPixels(const WinogradPlan& given, const S* source)
      : Base{given.gather, source}, h(given.h), w(given.w) {}

  void pack(int64_t group, int64_t, const PixelRun* runs, int64_t run_count, const PixelRun* joined,
            int64_t joined_count, const TilePlace*, int64_t tiles, int64_t c0, int64_t channels,
            int64_t u0, int64_t offsets, T* panel, bool* present) const {
    for (int64_t i = 0; i < tiles * offsets; ++i) present[i] = true;
    const S* source = data + (group * plan.channels + c0) * plan.source.stride[1];
    const PixelRun& last = runs[run_count - 1];
    const int64_t pixels = last.at + last.count;
    clear(panel + pixels * offsets * channels,
          (tiles * plan.pixel_width - pixels) * offsets * channels);
    if (plan.source.stride[1] == 1) {
      for (const PixelRun* run = joined; run < joined + joined_count; ++run)
        pack_run(
            *run, channels, u0, u0 + offsets, panel, offsets * channels,
            [&](int64_t ih, int64_t iw) { return source + plan.source.at(run->n, 0, ih, iw); });
      return;
    }
    // As many rows of values at a time as the patch has room for.
    const int64_t row = w.values.size();
    for (int64_t u = u0, next; u < u0 + offsets; u = next) {
      next = u0 + offsets;
      while (next - u > row && !PatchRows(h.values, u / row, (next - 1) / row)
                                    .fits(columns().end - columns().begin, channels))
        next = max_of(u + row, next - row);
      pack_transposed(source, joined, joined_count, channels, u, next, panel + (u - u0) * channels,
                      offsets * channels);
    }
  }

  // The source rows that the rows of values [first, last] read, relative to the pixel's.
  struct PatchRows {
    int64_t begin, span, count = 0;
    int16_t slot[kWinogradSpan];  // where a row is in the patch, or -1

    PatchRows(const std::vector<WinogradValue>& values, int64_t first, int64_t last) {
      const Range all = span_of(values, first, last + 1);
      begin = all.begin;
      span = all.end - all.begin;
      if (span > kWinogradSpan) return;
      for (int64_t i = 0; i < span; ++i) slot[i] = -1;
      for (int64_t i = first; i <= last; ++i)
        for (int64_t offset : {values[i].first, values[i].second})
          if (slot[offset - begin] < 0) slot[offset - begin] = static_cast<int16_t>(count++);
    }
    bool fits(int64_t columns, int64_t channels) const {
      return span <= kWinogradSpan && count * columns * channels <= kWinogradPatch;
    }
  };
  Range columns() const { return span_of(w.values, 0, w.values.size()); }

  // The values [u0, end) of a run, [pixel][value][channel]. `at` tells where the channels of a
  // source pixel are.
  template <class At>
  void pack_run(const PixelRun& run, int64_t channels, int64_t u0, int64_t end, T* panel,
                int64_t pitch, const At& at) const {
    using P = decltype(at(0, 0));
    const int64_t count_w = w.values.size();
    for (int64_t i = 0; i < run.count; ++i) {
      T* to = panel + (run.at + i) * pitch;
      const int64_t first_w = (run.jw + i) * plan.w.source_step;
      for (int64_t u = u0; u < end; ++u, to += channels) {
        const WinogradValue &a = h.values[u / count_w], &b = w.values[u % count_w];
        // Values that need fewer, and pixels outside, leave terms out.
        P terms[4];
        T sign[4];
        int count = 0;
        const auto add = [&](int64_t offset_h, int64_t offset_w, int s) {
          const int64_t ih = run.jh * plan.h.source_step + offset_h, iw = first_w + offset_w;
          if (s == 0 || ih < 0 || ih >= plan.h.source || iw < 0 || iw >= plan.w.source) return;
          terms[count] = at(ih, iw);
          sign[count++] = static_cast<T>(s);
        };
        add(a.first, b.first, 1);
        add(a.first, b.second, b.sign);
        add(a.second, b.first, a.sign);
        add(a.second, b.second, a.sign * b.sign);
        switch (count) {
          case 0:
            clear(to, channels);
            break;
          case 1:
            add_rows<1>(to, terms, sign, channels);
            break;
          case 2:
            add_rows<2>(to, terms, sign, channels);
            break;
          case 3:
            add_rows<3>(to, terms, sign, channels);
            break;
          default:
            add_rows<4>(to, terms, sign, channels);
        }
      }
    }
  }

  // Where rows of pixels are contiguous in memory instead of channels: piece by piece, what a run
  // reads is transposed first.
  DECONV_PHASE void pack_transposed(const S* source, const PixelRun* runs, int64_t run_count,
                                    int64_t channels, int64_t u0, int64_t u_end, T* panel,
                                    int64_t pitch) const {
    const int64_t count_w = w.values.size(), step = plan.w.source_step;
    const PatchRows rows(h.values, u0 / count_w, (u_end - 1) / count_w);
    const Range columns = this->columns();
    const int64_t reach = columns.end - columns.begin,
                  most = kWinogradPatch / (rows.count * channels);  // columns
    const int64_t at_once = max_of<int64_t>(1, (most - reach) / step + 1),
                  width = (at_once - 1) * step + reach;
    alignas(64) T patch[kWinogradPatch];
    for (const PixelRun* run = runs; run < runs + run_count; ++run)
      for (int64_t done = 0; done < run->count; done += at_once) {
        const PixelRun piece{run->at + done, min_of(at_once, run->count - done), run->n, run->jh,
                             run->jw + done};
        const int64_t first_h = piece.jh * plan.h.source_step + rows.begin,
                      first_w = piece.jw * step + columns.begin,
                      last_w = (piece.jw + piece.count - 1) * step + columns.end;
        const int64_t begin = max_of<int64_t>(0, first_w), end = min_of(plan.w.source, last_w);
        const auto at = [&](int64_t ih, int64_t iw) -> T* {
          return patch + (rows.slot[ih - first_h] * width + iw - first_w) * channels;
        };
        for (int64_t i = 0; i < rows.span; ++i)
          if (const int64_t ih = first_h + i; rows.slot[i] >= 0 && ih >= 0 && ih < plan.h.source)
            transpose(source + plan.source.at(piece.n, 0, ih, begin), plan.source.stride[1],
                      channels, end - begin, at(ih, begin), channels);
        pack_run(piece, channels, u0, u_end, panel, pitch, at);
      }
  }

  // The source offsets that some values read.
  static Range span_of(const std::vector<WinogradValue>& values, int64_t first, int64_t end) {
    Range all{values[first].first, values[first].second + 1};
    for (int64_t i = first; i < end; ++i) {
      all.begin = min_of(all.begin, values[i].first);
      all.end = max_of(all.end, values[i].second + 1);
    }
    return all;
  }

  // to[c] = sum of sign[i] * terms[i][c]
  template <int Count, class P>
  DECONV_INLINE static void add_rows(T* to, P* terms, const T* sign, int64_t channels) {
    constexpr int64_t kN = kLanes<T>;
    int64_t c = 0;
    for (; c + kN <= channels; c += kN) {
      Vector<T> sum = load_as<T>(terms[0] + c) * sign[0];
      for (int i = 1; i < Count; ++i) sum += load_as<T>(terms[i] + c) * sign[i];
      store_vector(to + c, sum);
    }
    for (; c < channels; ++c) {
      T sum = convert<T>(terms[0][c]) * sign[0];
      for (int i = 1; i < Count; ++i) sum += convert<T>(terms[i][c]) * sign[i];
      to[c] = sum;
    }
  }
};

// The kernel is read once and transformed for all plans, which agree on the blocks of weights.
template <class S, class T>
struct WinogradWeights {
  const std::vector<WinogradPlan>& plans;
  const GatherPlan& plan;  // any of them
  const S* data;
  T* packed;

  // Where the weights of a plan are.
  T* packed_of(size_t index) const {
    T* to = packed;
    for (size_t i = 0; i < index; ++i) to += plans[i].gather.weight_elements();
    return to;
  }

  // All of them.
  void pack(int threads) const {
    const int64_t blocks = (plan.channels + plan.channel_block - 1) / plan.channel_block,
                  tiles = (plan.row_chunk + plan.row_width - 1) / plan.row_width;
    parallel_for(plan.groups * plan.row_chunks * blocks * tiles, threads, [&](int64_t task) {
      const int64_t tile = task % tiles, block = task / tiles % blocks,
                    rest = task / tiles / blocks, c0 = block * plan.channel_block;
      in_phase(Phase::kWeights, [&] {
        pack_tile(rest / plan.row_chunks, rest % plan.row_chunks, tile, c0,
                  min_of(plan.channel_block, plan.channels - c0));
      });
    });
  }

  // Packs the channels [c0, c0 + channels) of one tile of rows: kernel elements as vectors of rows,
  // transformed in one direction, then in the other. Rows that do not exist have zeros.
  DECONV_PHASE void pack_tile(int64_t group, int64_t chunk, int64_t tile, int64_t c0,
                              int64_t channels) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t first_row = chunk * plan.row_chunk,
                  rows = min_of(plan.row_chunk, plan.rows - first_row);
    const S* source =
        data + (group * plan.weight.group + c0 * plan.weight.channel + first_row * plan.weight.row);
    const int64_t kernel_w = plan.params.problem.w.kernel,
                  elements = plan.params.problem.h.kernel * kernel_w;
    const int64_t at_once = channels_at_once();
    int64_t total = 0;
    for (const WinogradPlan& one : plans) total += one.h.weights.size() * one.w.weights.size();
    T **places, *kernel, *columns;
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      places = carver.take<T*>(total);
      kernel = carver.take<T>(at_once * elements * kN);
      columns = carver.take<T>(kernel_w * kN);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));
    T** next = places;
    for (size_t i = 0; i < plans.size(); ++i) {
      list_places(plans[i].gather, packed_of(i), plans[i].w.weights.size(), group, chunk, tile, c0,
                  channels, next);
      next += plans[i].h.weights.size() * plans[i].w.weights.size();
    }
    // The kernel in the order of memory.
    const bool rows_first = plan.weight.row > plan.weight.channel;
    const int64_t steps = plan.row_width / kN, pieces = (channels + at_once - 1) / at_once;
    for (int64_t i = 0; i < steps * pieces; ++i) {
      const int64_t lane = (rows_first ? i / pieces : i % steps) * kN,
                    begin = (rows_first ? i % pieces : i / steps) * at_once,
                    end = min_of(begin + at_once, channels);
      const int64_t row = tile * plan.row_width + lane,
                    count = max_of<int64_t>(0, min_of(kN, rows - row));
      load_kernels(source + row * plan.weight.row + begin * plan.weight.channel, count, end - begin,
                   kernel);
      for (int64_t c = begin; c < end; ++c) {
        const T* k = kernel + (c - begin) * elements * kN;
        T* const* place = places;
        for (const WinogradPlan& one : plans)
          for (const WinogradWeight& weight_h : one.h.weights) {
            for (int64_t kw : one.w.kernel)
              store_vector(columns + kw * kN, combine(weight_h, k + kw * kN, kernel_w * kN));
            for (const WinogradWeight& weight_w : one.w.weights)
              store_vector(*place++ + c * plan.row_width + lane, combine(weight_w, columns, kN));
          }
      }
    }
  }

  // Where each pair of transformed elements of a plan goes.
  void list_places(const GatherPlan& of, T* to, int64_t weights_w, int64_t group, int64_t chunk,
                   int64_t tile, int64_t c0, int64_t channels, T** places) const {
    T* panel = GatherWeights<T, const S*>{of, data, to}.panel_of(group, chunk, c0);
    for (const GatherClass& g : of.classes) {
      const PhaseClass &class_h = of.h.classes[g.h], &class_w = of.w.classes[g.w];
      const int64_t taps_w = class_w.offsets.size();
      for (int64_t tap = 0; tap < g.taps; ++tap)
        places[class_h.k[tap / taps_w] * weights_w + class_w.k[tap % taps_w]] =
            panel + channels * (g.first_weight + (tile * g.taps + tap) * plan.row_width);
    }
  }

  static DECONV_INLINE Vector<T> combine(const WinogradWeight& weight, const T* k, int64_t pitch) {
    Vector<T> sum = load_vector(k + weight.k[0] * pitch) * static_cast<T>(weight.factor[0]);
    for (int i = 1; i < weight.count; ++i)
      sum += load_vector(k + weight.k[i] * pitch) * static_cast<T>(weight.factor[i]);
    return sum;
  }

  bool kernel_contiguous() const {
    return GatherWeights<T, const S*>{plan, data, packed}.kernel_contiguous();
  }
  int64_t channels_at_once() const {
    return plan.weight.channel == 1 && !kernel_contiguous() ? kLanes<T> : 1;
  }

  // to[channel][kernel element][row], `count` rows and zeros beyond.
  void load_kernels(const S* from, int64_t count, int64_t channels, T* to) const {
    constexpr int64_t kN = kLanes<T>;
    const int64_t kernel_w = plan.params.problem.w.kernel,
                  elements = plan.params.problem.h.kernel * kernel_w;
    const auto square_of = [&](const S* corner, int64_t left, Vector<T>* square) {
      for (int64_t i = 0; i < kN; ++i)
        square[i] = i < count ? load_every<T, 1>(corner + i * plan.weight.row, left) : Vector<T>{};
      transpose_step<T, kN / 2>(square);
    };
    Vector<T> square[kN];
    if (kernel_contiguous()) {
      for (int64_t k = 0; k < elements; k += kN) {
        square_of(from + k, elements - k, square);
        for (int64_t j = 0; j < min_of(kN, elements - k); ++j)
          store_vector(to + (k + j) * kN, square[j]);
      }
      return;
    }
    for (int64_t k = 0; k < elements; ++k) {
      const S* element =
          from + k / kernel_w * plan.weight.kernel_h + k % kernel_w * plan.weight.kernel_w;
      if (plan.weight.channel == 1) {
        square_of(element, channels, square);
        for (int64_t c = 0; c < channels; ++c)
          store_vector(to + (c * elements + k) * kN, square[c]);
      } else if (plan.weight.row == 1) {
        store_vector(to + k * kN, load_every<T, 1>(element, count));
      } else {
        for (int64_t i = 0; i < kN; ++i)
          to[k * kN + i] = i < count ? convert<T>(element[i * plan.weight.row]) : T(0);
      }
    }
  }
};

template <class S>
struct WinogradStore : GatherStore<S> {
  using Base = GatherStore<S>;
  using T = typename Base::T;
  using Base::plan;  // of the results
  const WinogradPlan& all;

  explicit WinogradStore(const WinogradPlan& given) : Base{given.stored}, all(given) {}

  void finish(int64_t group, int64_t chunk, int64_t tiles, const PixelRun* runs, int64_t run_count,
              T* sums, T* bias, T* class_bias) const {
    bool finite = true;
    for (const WinogradPhase& h : all.h.phases)
      for (const WinogradPhase& w : all.w.phases)
        with_count(h.count(), [&](auto count_h) {
          with_count(w.count(), [&](auto count_w) {
            finite &= combine<count_h, count_w>(h, w, chunk, tiles, sums);
          });
        });
    if (!finite) this->template repair<true>(group, chunk, runs, run_count, sums);
    this->activate(chunk, tiles, sums, bias, class_bias);
    this->store(group, chunk, runs, run_count, sums, bias);
  }

  template <int N>
  struct Count {
    constexpr operator int() const { return N; }
  };
  template <class F>
  static void with_count(int count, const F& f) {
    count == 2 ? f(Count<2>{}) : count == 3 ? f(Count<3>{}) : f(Count<4>{});
  }

  // Of four sums (first, last, sum, difference), or as many as there are, makes y0 and y1.
  template <int N>
  static DECONV_INLINE void combine_axis(Vector<T>& first, Vector<T>& last, const Vector<T>& sum,
                                         const Vector<T>& difference) {
    if constexpr (N >= 3) {
      first += sum;
      last += sum;
    }
    if constexpr (N == 4) {
      first += difference;
      last -= difference;
    }
  }

  // Leaves the results of one phase where the sums of first and last were. Returns whether they are
  // all finite.
  template <int H, int W>
  DECONV_PHASE bool combine(const WinogradPhase& h, const WinogradPhase& w, int64_t chunk,
                            int64_t tiles, T* sums) const {
    const GatherPlan& g = all.gather;
    const int64_t rows = min_of(g.row_chunk, g.rows - chunk * g.row_chunk);
    const int64_t class_h[] = {h.first, h.last, h.sum, h.difference},
                  class_w[] = {w.first, w.last, w.sum, w.difference};
    T* at[H][W];
    for (int i = 0; i < H; ++i)
      for (int j = 0; j < W; ++j)
        at[i][j] =
            sums + g.sum_at(g.classes[class_h[i] * g.w.classes.size() + class_w[j]].first_row, 0);
    Vector<T> none{};  // x - x is zero unless x is infinite or NaN
    for (int64_t pixel = 0; pixel < tiles * g.pixel_width; ++pixel)
      for (int64_t i = g.sum_at(0, pixel); i < g.sum_at(rows, pixel); i += kLanes<T>) {
        Vector<T> v[4][4];
        for (int a = 0; a < H; ++a) {
          for (int b = 0; b < W; ++b) v[a][b] = load_vector(at[a][b] + i);
          combine_axis<W>(v[a][0], v[a][1], v[a][2], v[a][3]);
        }
        for (int b = 0; b < 2; ++b) {
          combine_axis<H>(v[0][b], v[1][b], v[2][b], v[3][b]);
          for (int a = 0; a < 2; ++a) {
            store_vector(at[a][b] + i, v[a][b]);
            none += v[a][b] - v[a][b];
          }
        }
      }
    bool finite = true;
    for (int i = 0; i < kLanes<T>; ++i) finite &= none[i] == 0;
    return finite;
  }
};

template <class S>
void winograd(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const auto plans =
      with_float_tiles<S>([&](const TileShape* tiles, int count, PanelFormat format) {
        return plan_winograd(op, params, tiles, count, format, threads);
      });
  int64_t elements = 0;
  for (const WinogradPlan& plan : plans) elements += plan.gather.weight_elements();
  const GatherPlan& any = plans.front().gather;
  const S *x = static_cast<const S*>(any.source.data), *w = static_cast<const S*>(any.weight.data);
  const WinogradWeights<S, T> weights{plans, any, w,
                                      static_cast<T*>(call_scratch(elements * sizeof(T)))};
  weights.pack(threads);

  using Gemm =
      GatherGemm<T, WinogradPixels<S, T>, GatherWeights<T, const S*>, WinogradStore<S>, NoSession>;
  std::vector<Gemm> gemms;
  int64_t tasks = 0;
  for (size_t i = 0; i < plans.size(); ++i) {
    const GatherPlan& g = plans[i].gather;
    gemms.push_back({g,
                     Tiles<T>::list[g.tile],
                     kPartialSum,
                     {g, w, weights.packed_of(i)},
                     {plans[i], x},
                     WinogradStore<S>(plans[i])});
    tasks += gemms.back().tasks();
  }
  parallel_for(tasks, threads, [&](int64_t task) {
    const Gemm* gemm = gemms.data();
    for (; task >= gemm->tasks(); ++gemm) task -= gemm->tasks();
    gemm->run(task);
  });
}

template <class S>
bool prefers_winograd(Op op, const Params& params) {
  return with_float_tiles<S>([&](const TileShape* tiles, int count, PanelFormat format) {
    return winograd_pays(op, params, tiles, count, format);
  });
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
