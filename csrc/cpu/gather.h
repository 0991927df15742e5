// forward and grad_input as one gather, and the plan by which the matrix kernel (gather_gemm.h)
// computes it.
//
//     target[n, row, j * target_step + r] =
//         bias[row] + sum over channels c and taps (k, offset) of phase r of
//                     source[n, c, j * source_step + offset] * weight[c, row, k]
//
//                   source   target   channels              rows
//     forward       x        y        c_in / groups         c_out / groups
//     grad_input    dy       dx       c_out / groups        c_in / groups
//
// As a matrix product: positions j of all images ("pixels") times (row, phase), summed over
// (channel, tap). Planning is plain C++, compiled once for all instruction sets; it knows a tile
// only by its shape.
#pragma once

#include <limits>
#include <utility>
#include <vector>

#include "../params.h"

namespace deconv {
namespace cpu {

struct WeightRef {
  const void* data;
  int64_t group, channel, row, kernel_h, kernel_w;  // strides
};

// Classes of phases of the two axes, paired.
struct GatherClass {
  int64_t h, w;                    // indices into the classes of the axes
  int64_t taps;                    // product of their numbers of offsets
  std::vector<int64_t> offset_at;  // [taps] where its offsets stand among the offsets of the panel
  int64_t padded_rows;             // rows of a full chunk, rounded up to tiles
  int64_t first_row;               // padded rows of the classes before it
  int64_t first_weight;            // packed weights a channel of the classes before it
};

struct TileShape {
  int rows, lanes;  // broadcast side, vector side
  double cycles;    // of a step, by the model
};

// Of what an element of the panels is a pair: nothing, two neighbouring channels, or two taps one
// below the other, where channels are odd in number.
enum class Pairs { kNone, kChannels, kTaps };

// What the product multiplies.
struct PanelFormat {
  int stored_bytes;   // of an element in memory
  int element_bytes;  // of an element of the panels
  int lanes;          // of a vector
  Pairs pairs;
  int64_t channel_unit;  // elements that it takes at a time
  bool rounds;           // can write sums to the target, rounded, where rows are lanes
};

// A model of one step of a register tile: two multiply-adds and two loads a cycle, a little for
// every vector of the panel, which comes from L2, and for the loop itself.
inline double cycles_per_step(int rows, int vectors) {
  return std::max(rows * vectors, rows + vectors) / 2.0 + vectors / 4.0 + 0.5;
}

// Room for so many elements, an odd number of cache lines: what lies so far apart meets in no set
// of a cache.
inline int64_t odd_lines(int64_t elements, int64_t element_bytes) {
  const int64_t line = 64 / element_bytes;
  return (ceil_div(elements, line) | 1) * line;
}

struct GatherPlan {
  Params params;
  Op op;
  int64_t stored_bytes;
  int64_t batch, groups, channels, rows;  // channels (or pairs of them) and rows of one group
  TensorRef source, target;
  WeightRef weight;
  // Elements of source, target and weight in memory are those of the panels. Strides of pairs are
  // in pairs then, else in elements.
  bool source_as_is, target_as_is, weight_as_is;
  bool rounds;  // elements of the target are not, but the product can write them
  AxisTaps h, w;

  // Where taps are paired, row ih of the source stands for two rows: ih - rows_apart and ih, of
  // which one may lie outside. So do the rows of kernels: for those in tap_pairs, where -1 is none.
  // Weights are such pairs already, in dense [c_in][c_out / groups][pair][kernel_w].
  int64_t rows_apart;  // 0 where they are not paired
  std::vector<std::pair<int64_t, int64_t>> tap_pairs;
  int64_t kernel_h;  // rows of kernels, or pairs of them

  // Every source offset that some class uses: the panel of packed pixels holds one shifted copy for
  // each.
  std::vector<int64_t> offsets_h, offsets_w;
  std::vector<int64_t> residues_h;  // that those of h have modulo the step, counted from the first
  std::vector<int64_t>
      source_at;  // [offsets_h][offsets_w] elements from a pixel to the source at that offset
  std::vector<GatherClass> classes;
  int64_t padded_rows;          // of all classes of a chunk
  int64_t weights_per_channel;  // packed elements of a chunk
  bool padded_weights;          // some of them stand for rows or taps that do not exist

  bool rows_across;       // vector lanes are rows (channels_last, large strides) instead of pixels
  bool rows_by_phase;     // rows of a class in the order (phase, row) instead of (row, phase): what
                          // lies contiguous in the target
  bool batch_innermost;   // a tile is one position of consecutive images, so that it skips its
                          // invalid taps; else pixels are numbered image by image
  double valid_fraction;  // of the taps, over all positions: the others read padding
  // Pixels are packed once for all taps, as zero-padded images that lie row after row ("flat"): a
  // tap is then a constant distance. Positions are padded likewise, so that pixel p of an image is
  // position p; targets of the padding lie outside. There is an image for each residue modulo the
  // steps of the source: of both axes where pixels are lanes, else of h alone, and a position is
  // step w neighbouring pixels with all their channels.
  bool flat;
  // Rows are lanes, and the sum goes channel by channel, so that a panel has one: the taps of a
  // pixel that are neighbours in a row of the source are neighbours in the panel then.
  bool by_channel;
  int64_t most_channels = std::numeric_limits<int64_t>::max();  // of a block
  int64_t flat_channel;          // elements from one channel to the next
  int64_t flat_residue;          // and from one image to the next, in pixels
  int64_t flat_reach;            // positions from a pixel to its last tap
  std::vector<int64_t> flat_at;  // [offsets] pixels from a pixel to that tap
  // All rows of a tile of pixels before the next pixels; else all pixels before the next rows.
  bool pixels_stay;
  // Tiles of pixels that have all taps (and targets) are read from the source where they are, and
  // written to the target by the product itself. Phases of a row of the target may take turns then.
  bool source_in_place, target_in_place, target_in_turns;
  bool streams;                         // rows of the target are written past the caches
  int tile;                             // index of the register tile
  int64_t pixel_width, row_width;       // tile size in pixels and in rows
  int64_t tiles;                        // tiles of pixels, of all images
  int64_t block_tiles;                  // pixel tiles that one task holds
  int64_t row_chunk, row_chunks;        // rows (before phases) summed at a time
  int64_t channel_block, offset_block;  // K is cut into blocks of channels x offsets
  int64_t chunks_per_task;

  // How many positions apart the taps of an axis are.
  static int64_t halo(const std::vector<int64_t>& offsets, int64_t step) {
    return offsets.empty() ? 0 : (offsets.back() - offsets.front()) / step;
  }
  // Elements of a flat panel from one pixel to the next, and from one position to the next.
  int64_t flat_pixel(int64_t block_channels) const { return rows_across ? block_channels : 1; }
  int64_t flat_position(int64_t block_channels) const {
    return rows_across ? block_channels * w.source_step : 1;
  }
  int64_t flat_elements() const {
    return rows_across ? channel_block * count_residues_h() * flat_residue
                       : channel_block * flat_channel;
  }
  // Rows as lanes, source in planes: whether taps that are neighbours in a row are packed by
  // transposed squares of taps and channels. That costs as much as element by element, but reads
  // each line once: channels a multiple of 1024 bytes apart share so few sets of the L1 cache that
  // the next tap would fetch the lines of all of them again.
  bool transposes_taps() const {
    return source.stride[3] == 1 && source.stride[1] * stored_bytes % 1024 == 0 &&
           offsets_w.size() > 2 &&
           offsets_w.back() - offsets_w.front() < static_cast<int64_t>(offsets_w.size());
  }
  int64_t count_residues_h() const { return static_cast<int64_t>(residues_h.size()); }
  int64_t residues() const { return count_residues_h() * w.source_step; }
  int64_t offsets() const { return static_cast<int64_t>(offsets_h.size() * offsets_w.size()); }
  // Where (row, phase) stands among the `rows` rows of its class.
  int64_t row_of(const PhaseClass& class_h, const PhaseClass& class_w, int64_t rows, int64_t row,
                 int64_t rh, int64_t rw) const {
    return rows_by_phase ? (rh * class_w.phases + rw) * rows + row
                         : (row * class_h.phases + rh) * class_w.phases + rw;
  }
  // Sums of a block: [padded row][pixel], or with rows_across [pixel][padded row].
  int64_t sum_pitch() const { return rows_across ? padded_rows : block_tiles * pixel_width; }
  int64_t sum_at(int64_t row, int64_t pixel) const {
    return rows_across ? pixel * sum_pitch() + row : row * sum_pitch() + pixel;
  }
  // Packed pixels: elements from one tap of a tile to the next. While a channel is packed, each tap
  // of each tile has an open cache line; an odd number of lines apart, they meet in no set. Few
  // channels leave few lines between taps anyway: there taps follow each other without a gap, so
  // that the product goes on from one to the next.
  int64_t tap_pitch(int64_t block_channels, int64_t element_bytes) const {
    if (rows_across) return block_channels;
    const int64_t elements = block_channels * pixel_width;
    return elements * element_bytes <= 8 * 64 ? elements : odd_lines(elements, element_bytes);
  }
  // Where rows are lanes: from one pixel to the next.
  int64_t pixel_pitch(int64_t block_channels, int64_t block_offsets, int64_t element_bytes) const {
    const int64_t elements = block_offsets * block_channels;
    return by_channel ? odd_lines(elements, element_bytes) : elements;
  }
  // From one tile to the next.
  int64_t tile_pitch(int64_t block_channels, int64_t block_offsets, int64_t element_bytes) const {
    return rows_across ? pixel_width * pixel_pitch(block_channels, block_offsets, element_bytes)
                       : block_offsets * tap_pitch(block_channels, element_bytes);
  }
  // Within the packed weights of a tile of rows and a tap. Where the product takes several channels
  // at a time and rows are its broadcast side, those of a row lie together.
  int64_t channel_unit;
  int64_t weight_at(int64_t row, int64_t channel) const {
    const int64_t unit = rows_across ? 1 : channel_unit;
    return channel / unit * unit * row_width + row * unit + channel % unit;
  }
  int64_t weight_elements() const { return groups * row_chunks * channels * weights_per_channel; }
};

// `tiles` are the register tiles of the ISA.
GatherPlan plan_gather(Op op, const Params& params, const TileShape* tiles, int tile_count,
                       const PanelFormat& format, int threads);

// rows_across of the plan.
bool has_rows_across(Op op, const Params& params, const TileShape* tiles, int tile_count,
                     const PanelFormat& format);

}  // namespace cpu
}  // namespace deconv
