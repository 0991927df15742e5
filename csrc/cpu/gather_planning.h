// What the planners of the gather product (gather.cpp, winograd_plan.cpp) and its model
// (gather_model.cpp) share.
#pragma once

#include <optional>

#include "gather.h"

namespace deconv {
namespace cpu {

struct Layout {
  bool rows_across, rows_by_phase, flat;
  bool by_channel;  // the sum goes channel by channel, each of which has its taps in rows
  bool in_turns;    // phases of a row of the target, written by the product itself
  int tile;
  double cycles;  // for one image and group
};

// Sizes of a thread's working set.
struct BlockLimits {
  int64_t panel_bytes, sum_bytes;
  int64_t least_channels;  // packed at a time, if there are as many
  int64_t least_rows;      // summed at a time, if there are as many, all phases counted
};

// Each thread's working set: packed pixels and sums stay in its L2 cache (1 MB on today's server
// cores) beside the weights that stream through.
constexpr int64_t kPanelBytes = 256 << 10;
// Pixels of a block: many enough to reuse a weight panel from L1, few enough for the two bounds
// above.
constexpr int64_t kBlockPixels = 96;
// Channels packed at a time, if there are as many: long runs, even if fewer offsets fit then.
constexpr int64_t kLeastChannels = 64;

// A model of one thread's cycles: what copying costs, measured roughly. A run is a short contiguous
// piece; far elements lie in lines of their own, which serve other pixels too unless they are lone.
// Each tap begins anew with each row of the source. A tile that differs from its neighbours lists
// its taps, and so does the next one.
constexpr double kVectorCopied = 2, kVectorStored = 3, kRun = 6, kElement = 2, kFarElement = 4,
                 kLoneElement = 8, kRounded = 6, kRow = 50, kListed = 16, kTransposed = 1.5;

// Pixels may be those of several images where less than that part of the taps reads the source, and
// channels are not contiguous there.
constexpr double kFewPadding = 0.8;

inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

// The gather itself: operands and tap tables; nothing that depends on the machine.
GatherPlan make_gather(Op op, const Params& params, const PanelFormat& format, bool merged_h,
                       bool merged_w);

// Every offset that some class uses, in both directions.
void list_offsets(GatherPlan& plan);

// Taps that read inside the source, as a fraction of those the table lists.
double valid_fraction(const AxisTaps& axis);

// What flat packing would be like.
struct Flat {
  bool possible;
  int64_t channels;  // packed at a time
  int64_t shift;     // the largest distance of a tap
  double waste;      // positions computed for each that exists
  double copies;     // of an element, since blocks share rows
};
// With rows as lanes, or with pixels.
Flat flat_images(const GatherPlan& plan, bool rows_across, int64_t element_bytes);

// `images` = 0 leaves out what a partly filled tile of pixels wastes. If `by_channel` is
// given, only layouts that sum so count, or only those that do not.
Layout best_layout(const GatherPlan& plan, const TileShape* tiles, int tile_count, int lanes,
                   int64_t element_bytes, int64_t images,
                   std::optional<bool> by_channel = std::nullopt);

// The best tables and the best layout of "gemm" by the model, without regard to the batch.
struct Choice {
  bool merged_h, merged_w;
  Layout layout;
};
Choice choose_merging(Op op, const Params& params, const TileShape* tiles, int tile_count,
                      const PanelFormat& format);

// Sizes of blocks. What decides the order of summation (channel_block, offset_block) depends on one
// image's geometry alone, so that a sample's result does not depend on its batch, on the number of
// threads or on the tile.
void choose_blocks(GatherPlan& plan, int64_t element_bytes, int threads, const BlockLimits& limits);

// Whether merged phases have unequal taps, so that some weights are zeros.
bool lacks_taps(const PhaseClass& axis);

// Where pixels are lanes: whether a tile of so many rows has all phases of some rows of the target,
// by one tap, and so can write them itself, in turns. (With more taps, those at the edges read
// padding and are stored apart, which made it slower.)
bool takes_turns(const GatherPlan& plan, int64_t row_width);

// Pairs the classes of both axes and lays out the packed rows of a chunk.
void pair_classes(GatherPlan& plan);

}  // namespace cpu
}  // namespace deconv
