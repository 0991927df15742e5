// The tiles of the matrix kernels: one table a family, legality checked here at compile time, and
// the choice among them by a pure host function (gemm_plan.h).
//
// A thread block of `gather` computes rows x pixels x phases outputs, in warp tiles of warp_rows x
// warp_pixels x phases. `phases` neighbouring column phases of a pixel lie in one thread's
// registers, so that a row of an NCHW target is written without gaps; where the channels of the
// target are contiguous (rows_across) a thread owns a run of rows instead.
//
// A thread block of `wgmma` computes the same by warpgroups.
//
// A thread block of `weight` computes c_in x c_out x (tap_warps * warp_taps) elements of dw from
// tiles of kWeightPixels pixels: warps split the taps, so that x and dy are staged once for all.
#pragma once

#include <cstdint>

namespace deconv {
namespace cuda {

constexpr int kVectorBytes = 16;       // of shared memory: the unit of every copy and ldmatrix
constexpr int kMaxAccumulators = 128;  // 32-bit registers a thread; 255 less operands, addresses
constexpr int kSharedBytes =
    227 * 1024;  // of a block on sm_90; 163 KiB on sm_80, asked at run time
constexpr int kGatherStages = 3;
constexpr int kWeightStages = 2;
constexpr int kWgmmaConsumers = 2;   // warpgroups that multiply, beside one that copies
constexpr int kWgmmaGroupWidth = 8;  // pixels of a row of a tile: a core matrix of wgmma has 8
constexpr int kMaxWgmmaStages = 4;
constexpr int kWgmmaRun = 8;  // rows_across: rows of a thread next to each other, one vector
constexpr int kWeightPixels = 64;
// Vectors of weights that a step stages for one row: taps of a row of the kernel times vectors of
// channels. 8 taps x 2 vectors (16 channels of 16 bits, one mma.sync) up to 2 taps x 8 vectors.
constexpr int kStepVectors = 16;
constexpr int kMaxStepTaps = 8;

struct GatherTile {
  const char* name;
  int rows, pixels, warp_rows, warp_pixels, phases;
  bool rows_across;
  double rate;  // relative throughput once the device is full; an estimate, not measured

  constexpr int threads() const { return 32 * (rows / warp_rows) * (pixels / warp_pixels); }
  constexpr int accumulators() const { return warp_rows * warp_pixels * phases / 32; }
  constexpr bool legal() const {
    return rows % warp_rows == 0 && pixels % warp_pixels == 0 && warp_rows % 16 == 0 &&
           warp_pixels % 16 == 0 && threads() <= 256 && accumulators() <= kMaxAccumulators &&
           (rows & (rows - 1)) == 0 && (pixels & (pixels - 1)) == 0 &&
           (!rows_across || phases == 1) &&
           kGatherStages * kStepVectors * rows * kVectorBytes <= kSharedBytes / 2;
  }
};

constexpr GatherTile kGatherTiles[] = {
    {"128x128", 128, 128, 32, 64, 1, false, 1.0},      // 0: grad_input, stride 1
    {"64x64", 64, 64, 32, 32, 1, false, 0.75},         // 1: the same, few tiles
    {"64x128x2", 64, 128, 32, 64, 2, false, 1.0},      // 2: stride 2
    {"32x64x2", 32, 64, 16, 32, 2, false, 0.6},        // 3: the same, few tiles or rows
    {"64x64x4", 64, 64, 32, 32, 4, false, 0.8},        // 4: strides of 3 and more
    {"128x128_last", 128, 128, 32, 64, 1, true, 1.0},  // 5: channels_last
    {"64x64_last", 64, 64, 32, 32, 1, true, 0.75},     // 6: the same, few tiles
};
constexpr int kGatherTileCount = sizeof(kGatherTiles) / sizeof(GatherTile);

// The tiles of the wgmma kernels (sm_90a, 16 bits): two warpgroups, each 64 rows (rows_across: 64
// pixels) by `columns` pixels (rows) by phases, as one product of a warpgroup is 64 x columns x 16.
struct WgmmaTile {
  const char* name;
  int rows, pixels, columns, phases;
  bool rows_across;

  // Of a block's tile, along its rows and its pixels.
  constexpr int warpgroup_rows() const { return rows_across ? columns : 64; }
  constexpr int warpgroup_pixels() const { return rows_across ? 64 : columns; }
  constexpr int accumulators() const { return columns / 2 * phases; }
  constexpr bool legal() const {
    return rows / warpgroup_rows() * (pixels / warpgroup_pixels()) == kWgmmaConsumers &&
           rows % warpgroup_rows() == 0 && pixels % warpgroup_pixels() == 0 &&
           accumulators() <= kMaxAccumulators && (!rows_across || phases == 1) && phases <= 4 &&
           (columns == 64 || columns == 128 || columns == 256) &&
           2 * kStepVectors * rows * kVectorBytes <= kSharedBytes * 2 / 3;
  }
};

constexpr WgmmaTile kWgmmaTiles[] = {
    {"128x128x2", 128, 128, 128, 2, false},    // 0: stride 2
    {"64x256x2", 64, 256, 128, 2, false},      // 1: the same, up to 64 rows
    {"64x128x4", 64, 128, 64, 4, false},       // 2: strides of 3 and more
    {"128x256", 128, 256, 256, 1, false},      // 3: grad_input, stride 1
    {"256x128_last", 256, 128, 256, 1, true},  // 4: channels_last
    {"128x128_last", 128, 128, 128, 1, true},  // 5: the same, up to 128 rows
};
constexpr int kWgmmaTileCount = sizeof(kWgmmaTiles) / sizeof(WgmmaTile);

// ... and of their grad_weight: each warpgroup 64 channels of x by c_out of dy by `taps` taps of
// one row of the kernel, from tiles of kWeightPixels pixels.
struct WgmmaWeightTile {
  const char* name;
  int c_in, c_out, taps;

  constexpr int accumulators() const { return c_out / 2 * taps; }
  constexpr bool legal() const {
    return c_in == 64 * kWgmmaConsumers && accumulators() <= kMaxAccumulators &&
           (c_out == 64 || c_out == 128 || c_out == 256);
  }
};

constexpr WgmmaWeightTile kWgmmaWeightTiles[] = {
    {"128x256x1", 128, 256, 1},  // 0: reads the least of shared memory for a product
    {"128x128x2", 128, 128, 2},  // 1: up to 128 channels of dy, or two taps that share pixels
    {"128x64x4", 128, 64, 4},    // 2: up to 64 channels of dy, or four taps
};
constexpr int kWgmmaWeightTileCount = sizeof(kWgmmaWeightTiles) / sizeof(WgmmaWeightTile);

struct WeightTile {
  const char* name;
  int c_in, c_out, warp_c_in, warp_c_out, tap_warps, warp_taps;
  double rate;

  constexpr int taps() const { return tap_warps * warp_taps; }
  constexpr int threads() const {
    return 32 * (c_in / warp_c_in) * (c_out / warp_c_out) * tap_warps;
  }
  constexpr int accumulators() const { return warp_c_in * warp_c_out * warp_taps / 32; }
  constexpr bool legal() const {
    return c_in % warp_c_in == 0 && c_out % warp_c_out == 0 && warp_c_in % 16 == 0 &&
           warp_c_out % 16 == 0 && threads() <= 256 && accumulators() <= kMaxAccumulators;
  }
};

constexpr WeightTile kWeightTiles[] = {
    {"64x32x16", 64, 32, 32, 32, 4, 4, 1.0},  // 0: kernels of 3x3 and more
    {"64x64x4", 64, 64, 64, 64, 4, 1, 1.0},   // 1: 2x2
    {"32x32x4", 32, 32, 32, 32, 4, 1, 0.6},   // 2: few channels; float64
    {"32x16x4", 32, 16, 32, 16, 4, 1, 0.4},   // 3: wide types, wide halos
};
constexpr int kWeightTileCount = sizeof(kWeightTiles) / sizeof(WeightTile);

constexpr bool all_legal() {
  for (const GatherTile& tile : kGatherTiles)
    if (!tile.legal()) return false;
  for (const WgmmaTile& tile : kWgmmaTiles)
    if (!tile.legal()) return false;
  for (const WgmmaWeightTile& tile : kWgmmaWeightTiles)
    if (!tile.legal()) return false;
  for (const WeightTile& tile : kWeightTiles)
    if (!tile.legal()) return false;
  return true;
}
static_assert(all_legal(), "a tile that does not fit registers, warps or shared memory");

// How products are formed: what is compiled for each is a subset of the tiles, as bits.
struct ArithmeticInfo {
  const char* name;
  int element_bytes;
  unsigned gather_tiles, weight_tiles;
};
enum Product { kMma16, kTf32, kFma32, kMma64 };
constexpr ArithmeticInfo kProducts[] = {
    {"mma.sync, 16 bits", 2, 0x7f, 0x7},
    {"mma.sync, TF32", 4, 0x7f, 0xf},
    {"FFMA, float32", 4, 0x6b, 0xd},
    {"mma.sync, float64", 8, 0x4a, 0xc},
};

}  // namespace cuda
}  // namespace deconv
