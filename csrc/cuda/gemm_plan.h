// forward and grad_input as one matrix product over a gather, and grad_weight as another: the
// tables that their kernels are given, and the choice of tiles. Plain C++, no CUDA, so that the CPU
// tests it.
//
//     target[n, row, j * target_step + r] = bias[row] + sum over channels c, taps (k, offset) of
//                           phase r of source[n, c, j * source_step + offset] * weight[c, row, k]
//
//                   source   target   channels         rows
//     forward       x        y        c_in / groups    c_out / groups
//     grad_input    dy       dx       c_out / groups   c_in / groups
//
// What a block reads of the source lies in shared memory as [channels / v][pixel][v], v * sizeof =
// 16 bytes. Source columns are split into *planes*: one for each remainder modulo source_step, in
// which neighbouring positions j are neighbours. So the operand of a tap is the same list of pixels
// for every tap, displaced by one number.
//
// Taps of an axis are cut into *groups* that share a staged tile: at most kMaxPlanes planes, each
// spanning at most kMaxSpan positions. Order of summation: split, group, chunk of channels, row of
// the kernel, column of the kernel, channel. It depends on the geometry of one image and on whether
// phases share a thread, never on the batch or the tile.
#pragma once

#include <stdexcept>
#include <string>

#include "../params.h"
#include "configs.h"

namespace deconv {
namespace cuda {

constexpr int kMaxTaps = 64;  // of an axis: kernel and stride; more is left to other algorithms
constexpr int kMaxPlanes = 2;
constexpr int kMaxSpan = 8;
constexpr int kMaxPhases = 4;
// Of a sum, channels times taps, that one block adds up; the groups of taps of longer ones are
// split among several. Only large kernels have such sums (21 channels, 64x64: 2^16.4), and images
// too small to give every multiprocessor a block without.
constexpr int64_t kMostTerms = 1 << 14;

struct TapGroup {
  int32_t base[kMaxPlanes];  // source offset where each plane begins
  int8_t planes;
  int8_t tap[kMaxPhases + 1];  // taps of the q-th phase of the set: [tap[q], tap[q + 1])
};

// One axis. Phases stand in ascending order in *sets* that a block computes together.
struct AxisTable {
  int32_t source, target, source_step, target_step, positions;
  int32_t sets, taps;
  int32_t planes, span;        // the most of any group: extents of the staged tile
  int8_t phase[kMaxTaps + 1];  // phases of set s: [phase[s], phase[s + 1])
  int8_t group[kMaxTaps + 1];  // groups of set s: [group[s], group[s + 1])
  TapGroup groups[kMaxTaps];
  int8_t k[kMaxTaps], plane[kMaxTaps], step[kMaxTaps];  // of a tap: kernel index, place in a plane
};

AxisTable make_axis_table(const AxisTaps& taps, int phases, int max_group_taps);

// The pixels that a block stages, n x (planes x extent)_h x (planes x extent)_w, and how.
struct StagedTile {
  int32_t planes_h, extent_h, planes_w, extent_w, images;
  int32_t pixels, pitch;  // `pitch`: vectors from one vector of channels to the next
};

// A strided operand as the loader sees it; strides in elements.
struct Operand {
  void* data;
  int64_t stride[4];
  int32_t batch, h, w, channels;  // channels of one group
  bool vectors;                   // channels contiguous and aligned: 16-byte copies
  bool channel_fastest;
};

// Positions j of all images in tiles of (1 << log_n) x (1 << log_h) x (1 << log_w).
struct PixelTiling {
  int32_t log_n, log_h, log_w, tiles_n, tiles_h, tiles_w;
  int64_t tiles() const { return static_cast<int64_t>(tiles_n) * tiles_h * tiles_w; }
};

struct GatherPlan {
  Params params;  // for elements that came out as NaN
  Op op;
  Operand source, target;
  const void* bias;
  int64_t bias_stride;
  void* packed;  // weights [group][tap h][tap w][channels / v][rows_padded][v]
  int64_t w_group, w_channel, w_row, w_h, w_w;  // strides of the weight
  int32_t groups, rows, rows_padded, row_tiles;
  int32_t vectors, log_chunk, chunks;  // vectors of channels; of them 1 << log_chunk are a chunk
  int32_t step_vectors, source_buffers;
  int32_t splits;  // blocks of a tile, each with its share of the groups of taps
  bool combining;  // they are done: their sums are added and stored
  void* partial;   // [split][tile][sum of a thread][thread]; null without splits
  PixelTiling tiling;
  StagedTile staged;
  AxisTable h, w;
  int tile;
  int64_t blocks, shared_bytes;
  int64_t packed_vectors() const {
    return static_cast<int64_t>(groups) * h.taps * w.taps * vectors * rows_padded;
  }
  int64_t tiles() const { return tiling.tiles() * row_tiles * h.sets * w.sets * groups; }
};

struct WeightPlan {
  Params params;
  Operand x, dy;
  void* partial;  // [split][group][tap h][tap w][c_in_padded][c_out_padded] sums
  int32_t groups, c_in, c_out, c_in_padded, c_out_padded, c_in_tiles, c_out_tiles;
  int32_t tap_sets, groups_h, groups_w;
  int32_t splits, x_pitch;
  PixelTiling tiling;
  StagedTile staged;
  AxisTable h, w;
  int tile;
  int64_t blocks, shared_bytes;
  int64_t partial_elements() const {
    return static_cast<int64_t>(groups) * h.taps * w.taps * c_in_padded * c_out_padded;
  }
};

// What the choice may depend on, besides the problem.
struct Device {
  int multiprocessors;
  int64_t shared_bytes;  // that a block may have
};

// The condition that fails, or null.
const char* decline_gemm(Op op, const Params& params);

// What does not depend on the pixels of a tile: operands, tables, rows and chunks of channels; of
// grad_weight all taps of a group in one set.
GatherPlan describe_gather(Op op, const Params& params, int64_t element_bytes, int tile_rows,
                           int phases);

WeightPlan describe_weight(const Params& params, int64_t element_bytes, int tile_c_in,
                           int tile_c_out, int max_group_taps_h, int max_group_taps_w);

// The index of the tile of that name among those that bits of `compiled` stand for, or
// std::invalid_argument.
template <class Tile, size_t count>
int find_tile(const Tile (&tiles)[count], unsigned compiled, const std::string& name) {
  std::string names;
  for (size_t i = 0; i < count; ++i) {
    if (!(compiled >> i & 1)) continue;
    if (name == tiles[i].name) return static_cast<int>(i);
    names += std::string(names.empty() ? "" : ", ") + tiles[i].name;
  }
  throw std::invalid_argument("the tile '" + name + "' is not one of " + names);
}

// Throws std::invalid_argument: the tile of that name, or none, fits shared memory.
[[noreturn]] void does_not_fit(const std::string& name);

// The distance of a pixel's vectors of channels, 2 or a multiple of 4 of them, such that copies of
// 32 neighbouring vectors, channels fastest, fill all banks evenly.
int32_t copy_pitch(int64_t pixels, int vectors);

// The plan with the tile `name`, or with the best one if it is empty. Throws std::invalid_argument
// if there is no such tile, or it cannot take the problem.
GatherPlan plan_gather(Op op, const Params& params, Product product, const std::string& name,
                       const Device& device);
WeightPlan plan_weight(const Params& params, Product product, const std::string& name,
                       const Device& device);

}  // namespace cuda
}  // namespace deconv
