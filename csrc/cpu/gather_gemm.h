// "gemm": forward and grad_input as a blocked matrix product over a gather plan (gather.h).
//
//   pack the weights, all threads
//   for each block of pixels (and chunk of rows), in parallel:
//     for each block of channels and offsets:
//       pack the pixels
//       for each class, tile of rows, tile of pixels:
//         multiply_tiles over the class's taps; taps that no pixel of the tile has are skipped
//     add the bias, apply the activation, put the phases back into their places, round, store
//
//   packed weights  [group][chunk][block of channels][class][tile of rows][tap][channel][row_width]
//   packed pixels   [tile of pixels][offset][channel][lanes]  or  [pixel][offset][channel]
//
// The vector side of the tile is pixels or rows (plan.rows_across): what is contiguous in the
// target. Scratch per thread is the panel and the sums of one block, bounded by constants in
// gather.cpp; no column buffer.
#pragma once

#include "../parallel.h"
#include "gather_pixels.h"
#include "gather_short.h"
#include "gather_store.h"
#include "gather_weights.h"
#include "microkernel.h"
#include "profile.h"
#include "scratch.h"

namespace deconv {
namespace cpu {
namespace DECONV_ISA {

// T: elements of sums, and as wide, of panels. Pixels, Weights, Store: GatherPixels, GatherWeights,
// GatherStore or what does the same. Session: what a thread must hold while it multiplies and
// stores.
template <class T, class Pixels, class Weights, class Store, class Session>
struct GatherGemm {
  const GatherPlan& plan;
  const Tile<T>& tile;
  int64_t partial_sum;  // steps summed apart
  Weights weight_pack;
  Pixels pixel_pack;
  Store store;

  // Tiles multiplied in one call.
  static constexpr int64_t kTilesAtOnce = 16;

  // So many elements of the target on, which are not always T.
  T* advance(void* at, int64_t elements) const {
    return reinterpret_cast<T*>(static_cast<char*>(at) + elements * plan.stored_bytes);
  }
  // Where a tile of rows goes in the target, for pixels whose first element is at zero. `lines` is
  // room for those of the tile, where phases take turns.
  TileTarget<T> in_target(const GatherClass& g, int64_t group, int64_t chunk, int64_t rows,
                          int64_t row, const T* bias, LinePlace<T>* lines) const {
    const PhaseClass &h = plan.h.classes[g.h], &w = plan.w.classes[g.w];
    const auto element = [&](int64_t of_chunk, int64_t rh, int64_t rw) {
      return plan.target.at(0, group * plan.rows + chunk * plan.row_chunk + of_chunk,
                            h.first_phase + rh, w.first_phase + rw);
    };
    if (plan.target_in_turns) {
      const int64_t first = row / w.phases,
                    count = min_of(tile.rows / w.phases, rows * h.phases - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t of_chunk = (first + i) / h.phases, rh = (first + i) % h.phases;
        lines[i] = {element(of_chunk, rh, 0), bias ? bias[of_chunk] : T(0)};
      }
      TileTarget<T> to{advance(plan.target.data, 0), {}, count, false, {}};
      to.lines = lines;
      return to;
    }
    if (!plan.rows_across)
      return {advance(plan.target.data, element(row, 0, 0)),
              {plan.target.stride[1]},
              min_of<int64_t>(tile.rows, rows - row),
              false,
              {nullptr}};
    // Vectors of rows lie within one phase.
    const int64_t phase = row / rows, first = row - phase * rows;
    return {advance(plan.target.data, element(first, phase / w.phases, phase % w.phases)),
            {plan.w.target_step * plan.target.stride[3]},
            tile.rows,
            false,
            {bias ? bias + first : nullptr}};
  }

  DECONV_PHASE void multiply(int64_t group, int64_t chunk, int64_t tiles, const TilePlace* places,
                             int64_t c0, int64_t channels, int64_t u0, int64_t offsets,
                             const T* panel, const bool* present, SegmentList& segments,
                             int64_t* row_offsets, TileTarget<T>* targets, LinePlace<T>* lines,
                             T* sums, const T* bias) const {
    const T* packed = weight_pack.panel_of(group, chunk, c0);
    const T* source = static_cast<const T*>(plan.source.data) +
                      (group * plan.channels + c0) * plan.source.stride[1];
    const bool last_block = c0 + channels == plan.channels && u0 + offsets == plan.offsets();
    const int64_t rows = min_of(plan.row_chunk, plan.rows - chunk * plan.row_chunk);
    const int64_t panel_pitch = plan.flat ? plan.pixel_width * plan.flat_position(channels)
                                          : plan.tile_pitch(channels, offsets, sizeof(T));
    const MultiplyTiles<T> to_sums = plan.rows_across ? tile.contiguous_a : tile.panel_a,
                           to_target = plan.rows_across          ? tile.contiguous_a_to_target
                                       : !plan.target_in_turns   ? tile.panel_a
                                       : plan.w.target_step == 2 ? tile.panel_a_by_2
                                                                 : tile.panel_a_by_4;
    int64_t* in_place_offsets = row_offsets + tile.rows;
    for (int m = 0; m < tile.rows; ++m) {
      row_offsets[m] = !plan.rows_across ? plan.weight_at(m, 0)
                       : plan.flat       ? m * plan.flat_position(channels)
                                         : m * plan.pixel_pitch(channels, offsets, sizeof(T));
      in_place_offsets[m] =
          plan.rows_across ? m * plan.w.source_step * plan.source.stride[3] : row_offsets[m];
    }
    for (const GatherClass& g : plan.classes) {
      // Its taps begin in an earlier block of offsets, in this one or in a later one.
      const int64_t first_tap = g.taps > 0 ? g.offset_at.front() : 0;
      const bool accumulate = c0 > 0 || first_tap < u0;
      if (first_tap >= u0 + offsets) continue;
      const int64_t class_rows = rows * plan.h.classes[g.h].phases * plan.w.classes[g.w].phases;
      const int64_t row_tiles = (class_rows + plan.row_width - 1) / plan.row_width;
      if (plan.target_in_place)
        for (int64_t i = 0; i < row_tiles; ++i)
          targets[i] = in_target(g, group, chunk, rows, i * plan.row_width,
                                 last_block ? bias : nullptr, lines + i * plan.row_width);
      const T* weights = packed + channels * g.first_weight;
      const auto is_in_place = [&](int64_t t) { return places[t].source >= 0; };
      const auto pixels_of = [&](int64_t t) {
        return is_in_place(t) ? source + places[t].source : panel + t * panel_pitch;
      };
      const auto offsets_of = [&](int64_t t) {
        return is_in_place(t) ? in_place_offsets : row_offsets;
      };
      // Tiles wait until there are many, or one has other segments or is written otherwise.
      TileTask<T> waiting[kTilesAtOnce];
      int64_t waiting_count = 0, listed = -1;  // for which tile of pixels the segments are
      const auto is_to_target = [&](int64_t t) { return places[t].target >= 0; };
      const auto multiply_waiting = [&] {
        if (waiting_count > 0)
          (is_to_target(listed) ? to_target : to_sums)(segments, waiting, waiting_count);
        waiting_count = 0;
      };
      const auto list = [&](int64_t t) {
        multiply_waiting();
        list_segments(g, is_in_place(t), channels, u0, offsets, present + t * offsets, segments);
        listed = t;
      };
      const auto multiply_one = [&](int64_t t, int64_t row_tile) DECONV_INLINED {
        const TilePlace& place = places[t];
        if (listed != t && (listed < 0 || !place.whole || !places[listed].whole ||
                            is_in_place(t) != is_in_place(listed) ||
                            (to_target != to_sums && is_to_target(t) != is_to_target(listed))))
          list(t);
        const int64_t row = row_tile * plan.row_width;
        // Written where it stays: copying what has just been put together would wait for it.
        TileTask<T>& task = waiting[waiting_count];
        TileTarget<T>& to = task.to;
        if (is_to_target(t)) {
          to = targets[row_tile];
          to.c = advance(to.c, place.target);
          if (plan.target_in_turns) to.vectors = place.vectors;
        } else {
          to = {sums + plan.sum_at(g.first_row + row, t * plan.pixel_width),
                {plan.sum_pitch()},
                tile.rows,
                false,
                {nullptr}};
        }
        to.accumulate = accumulate;
        if (segments.count == 0 && accumulate && !to.bias) return;
        const T *w = weights + channels * row * g.taps, *x = pixels_of(t);
        task.a = plan.rows_across ? x : w;
        task.b = plan.rows_across ? w : x;
        task.row = offsets_of(t);
        ++waiting_count;
        if (waiting_count == kTilesAtOnce) multiply_waiting();
      };
      const int64_t steps = g.taps * channels;
      if (plan.rows_across && plan.target_in_place && last_block && !accumulate && steps > 0 &&
          steps <= kMostShortSteps && tile.multiply_short) {
        for (int64_t t = 0, end; t < tiles; t = end) {
          end = end_of_alike(places, t, tiles);
          if (end == t) {  // at an edge
            for (int64_t row_tile = 0; row_tile < row_tiles; ++row_tile) multiply_one(t, row_tile);
            ++end;
            continue;
          }
          list(t);
          int64_t at[kMostShortSteps], count = 0;
          for (int64_t s = 0; s < segments.count; ++s)
            for (int64_t i = 0; i < segments.list[s].length; ++i)
              at[count++] = segments.list[s].a + i;
          tile.multiply_short(steps,
                              {weights, targets, row_tiles, is_in_place(t) ? source : pixels_of(t),
                               places + t, end - t, panel_pitch, offsets_of(t), at});
        }
        multiply_waiting();
        continue;
      }
      const int64_t inner = plan.pixels_stay ? row_tiles : tiles,
                    outer = plan.pixels_stay ? tiles : row_tiles;
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t i = 0; i < inner; ++i)
          multiply_one(plan.pixels_stay ? o : i, plan.pixels_stay ? i : o);
      multiply_waiting();
    }
  }

  // From one step to the next on the vector side: from channel to channel.
  int64_t step_b(bool in_place) const {
    return plan.rows_across ? plan.row_width
           : in_place       ? plan.source.stride[1]
           : plan.flat      ? plan.flat_channel
                            : plan.pixel_width;
  }

  // The end of the tiles from t on that are whole, written in place, and read alike: t if that one
  // is not.
  static int64_t end_of_alike(const TilePlace* places, int64_t t, int64_t tiles) {
    const bool in_place = places[t].source >= 0;
    while (t < tiles && places[t].whole && places[t].target >= 0 &&
           (places[t].source >= 0) == in_place)
      ++t;
    return t;
  }

  static bool complete(const bool* present, int64_t offsets) {
    bool all = true;
    for (int64_t u = 0; u < offsets; ++u) all &= present[u];
    return all;
  }

  // Partial sums end at fixed places of K = (tap, channel), whatever is skipped: the result must
  // not depend on the other pixels of the tile. Neighbouring taps whose weights and pixels both go
  // on are one segment.
  void list_segments(const GatherClass& g, bool in_place, int64_t channels, int64_t u0,
                     int64_t offsets, const bool* present, SegmentList& segments) const {
    const int64_t pixel_step = plan.rows_across ? 1 : step_b(in_place),
                  flat_pixel = plan.flat_pixel(channels);
    segments.count = 0;
    segments.step_a = plan.rows_across ? 1 : plan.row_width;
    segments.step_b = step_b(in_place);
    for (int64_t k0 = 0; k0 < g.taps * channels; k0 += partial_sum) {
      const int64_t before = segments.count;
      const int64_t k1 = min_of(k0 + partial_sum, g.taps * channels);
      int64_t last = -1, next = 0;  // where the last segment's steps and pixels end
      for (int64_t tap = k0 / channels; tap * channels < k1; ++tap) {
        const int64_t u = g.offset_at[tap] - u0;
        if (u < 0 || u >= offsets || !present[u]) continue;
        const int64_t begin = max_of(k0, tap * channels), end = min_of(k1, (tap + 1) * channels);
        const int64_t pixel = (in_place    ? plan.source_at[g.offset_at[tap]]
                               : plan.flat ? plan.flat_at[g.offset_at[tap]] * flat_pixel
                                           : u * plan.tap_pitch(channels, sizeof(T))) +
                              (begin - tap * channels) * pixel_step;
        const int64_t weight = begin * plan.row_width;
        if (pixel == next && begin == last) {
          segments.list[segments.count - 1].length += end - begin;
        } else {
          segments.list[segments.count++] = plan.rows_across
                                                ? Segment{pixel, weight, end - begin, false}
                                                : Segment{weight, pixel, end - begin, false};
        }
        next = pixel + (end - begin) * pixel_step;
        last = end;
      }
      if (segments.count > before) segments.list[segments.count - 1].ends_part = true;
    }
  }

  // Tasks: groups, blocks of pixels, chunks of rows.
  int64_t blocks() const { return (plan.tiles + plan.block_tiles - 1) / plan.block_tiles; }
  int64_t splits() const {
    return (plan.row_chunks + plan.chunks_per_task - 1) / plan.chunks_per_task;
  }
  int64_t tasks() const { return plan.groups * blocks() * splits(); }
  void run(int64_t task) const {
    const int64_t first_chunk = task % splits() * plan.chunks_per_task, rest = task / splits();
    block(rest / blocks(), rest % blocks() * plan.block_tiles, first_chunk,
          min_of(plan.chunks_per_task, plan.row_chunks - first_chunk));
  }

  // One block of pixels, `chunks` chunks of rows

  void block(int64_t group, int64_t first_tile, int64_t first_chunk, int64_t chunks) const {
    [[maybe_unused]] const Session session{};
    const int64_t tiles = min_of(plan.block_tiles, plan.tiles - first_tile);
    const int64_t offsets = plan.offsets(), pixels = plan.block_tiles * plan.pixel_width;
    const int64_t lanes = kLanes<T>;
    T *panel, *sums, *bias, *class_bias;
    bool* present;
    TilePlace* places;
    VectorPlace* vectors;
    PixelRun *runs, *packed, *stored;
    SegmentList segments;
    int64_t* row_offsets;
    TileTarget<T>* targets;  // of the tiles of rows of a class
    LinePlace<T>* lines;
    const auto carve = [&](void* memory) {
      Carver carver(memory);
      panel = carver.take<T>(plan.flat ? plan.flat_elements()
                                       : plan.block_tiles * plan.tile_pitch(plan.channel_block,
                                                                            plan.offset_block,
                                                                            sizeof(T)) +
                                             lanes);
      sums = carver.take<T>(pixels * plan.padded_rows);
      bias = carver.take<T>(plan.row_chunk);
      class_bias = carver.take<T>(plan.padded_rows);
      present = carver.take<bool>(plan.block_tiles * plan.offset_block);
      places = carver.take<TilePlace>(plan.block_tiles);
      vectors = carver.take<VectorPlace>(pixels / kLanes<T>);
      for (PixelRun** list : {&runs, &packed, &stored}) *list = carver.take<PixelRun>(pixels);
      // A tap spans at most one more partial sum than its channels fill.
      segments.list =
          carver.take<Segment>(offsets + offsets * plan.channel_block / partial_sum + 2);
      row_offsets = carver.take<int64_t>(2 * tile.rows);
      targets = carver.take<TileTarget<T>>(plan.padded_rows / plan.row_width);
      lines = carver.take<LinePlace<T>>(plan.target_in_turns ? plan.padded_rows : 0);
      return carver.used();
    };
    carve(thread_scratch(carve(nullptr)));

    const int64_t run_count = pixel_pack.list_runs(first_tile, tiles, runs);
    pixel_pack.place_tiles(runs, run_count, tiles, places, vectors);
    const auto is_packed = [&](int64_t t) { return places[t].source < 0; };
    const auto is_stored = [&](int64_t t) { return places[t].target < 0; };
    const int64_t packed_count = pixel_pack.join_runs(runs, run_count, is_packed, packed);
    const int64_t stored_count = pixel_pack.join_runs(runs, run_count, is_stored, stored);
    const bool one_panel = plan.channel_block >= plan.channels && plan.offset_block >= offsets;
    for (int64_t chunk = first_chunk; chunk < first_chunk + chunks; ++chunk) {
      store.load_bias(group, chunk, bias);
      if (offsets == 0)
        for (int64_t i = 0; i < pixels * plan.padded_rows; ++i) sums[i] = 0;
      for (int64_t c0 = 0; c0 < plan.channels; c0 += plan.channel_block)
        for (int64_t u0 = 0; u0 < offsets; u0 += plan.offset_block) {
          const int64_t channels = min_of(plan.channel_block, plan.channels - c0),
                        u = min_of(plan.offset_block, offsets - u0);
          if (!one_panel || chunk == first_chunk)
            in_phase(Phase::kPack, [&] {
              pixel_pack.pack(group, first_tile * plan.pixel_width, runs, run_count, packed,
                              packed_count, places, tiles, c0, channels, u0, u, panel, present);
              for (int64_t t = 0; t < tiles; ++t) places[t].whole = complete(present + t * u, u);
            });
          in_phase(Phase::kProduct, [&] {
            multiply(group, chunk, tiles, places, c0, channels, u0, u, panel, present, segments,
                     row_offsets, targets, lines, sums, plan.params.bias ? bias : nullptr);
          });
        }
      in_phase(Phase::kStore, [&] {
        store.finish(group, chunk, tiles, stored, stored_count, sums, bias, class_bias);
      });
    }
    if (plan.streams) end_streams();
  }
};

// All blocks of weights. `pack` is as that of GatherWeights.
template <class Weights>
void pack_weights(const GatherPlan& plan, const Weights& weights, int threads) {
  const int64_t channel_blocks = (plan.channels + plan.channel_block - 1) / plan.channel_block;
  parallel_for(plan.groups * plan.row_chunks * channel_blocks, threads, [&](int64_t task) {
    const int64_t c0 = task % channel_blocks * plan.channel_block, rest = task / channel_blocks;
    in_phase(Phase::kWeights, [&] {
      weights.pack(rest / plan.row_chunks, rest % plan.row_chunks, c0,
                   min_of(plan.channel_block, plan.channels - c0));
    });
  });
}

// Runs the plan.
template <class Gemm>
void run_gather(const Gemm& gemm, int threads) {
  pack_weights(gemm.plan, gemm.weight_pack, threads);
  parallel_for(gemm.tasks(), threads, [&](int64_t task) { gemm.run(task); });
}

// Calls f(tiles, their number, format of the panels).
template <class S, class F>
auto with_float_tiles(const F& f) {
  using T = typename Arithmetic<S>::type;
  constexpr int kTiles = sizeof(Tiles<T>::list) / sizeof(Tile<T>);
  TileShape shapes[kTiles];
  for (int i = 0; i < kTiles; ++i) {
    const Tile<T>& tile = Tiles<T>::list[i];
    shapes[i] = {tile.rows, tile.vectors * kLanes<T>, cycles_per_step(tile.rows, tile.vectors)};
  }
  return f(shapes, kTiles, PanelFormat{sizeof(S), sizeof(T), kLanes<T>, Pairs::kNone, 1, false});
}

// Whether vector lanes of gather_gemm are rows.
template <class S>
bool gather_has_rows_across(Op op, const Params& params) {
  return with_float_tiles<S>([&](const TileShape* tiles, int count, PanelFormat format) {
    return has_rows_across(op, params, tiles, count, format);
  });
}

template <class S>
void gather_gemm(Op op, const Params& params, int threads) {
  using T = typename Arithmetic<S>::type;
  const GatherPlan plan =
      with_float_tiles<S>([&](const TileShape* tiles, int count, PanelFormat format) {
        return plan_gather(op, params, tiles, count, format, threads);
      });
  T* packed = static_cast<T*>(call_scratch(plan.weight_elements() * sizeof(T)));
  const S *x = static_cast<const S*>(plan.source.data),
          *w = static_cast<const S*>(plan.weight.data);
  run_gather(
      GatherGemm<T, GatherPixels<T, const S*>, GatherWeights<T, const S*>, GatherStore<S>,
                 NoSession>{
          plan, Tiles<T>::list[plan.tile], kPartialSum, {plan, w, packed}, {plan, x}, {plan}},
      threads);
}

}  // namespace DECONV_ISA
}  // namespace cpu
}  // namespace deconv
