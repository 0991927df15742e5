#include <initializer_list>
#include <limits>
#include <numeric>
#include <utility>

#include "../choices.h"
#include "gather_planning.h"

namespace deconv {
namespace cpu {
namespace {

// Each thread's working set: packed pixels and sums stay in its L2 cache (1 MB on today's server
// cores) beside the weights that stream through.
constexpr int64_t kPanelBytes = 256 << 10;
// Pixels of a block: many enough to reuse a weight panel from L1, few enough for the two bounds
// above.
constexpr int64_t kBlockPixels = 96;
constexpr int64_t kMaxBlockPixels = 384;
// Channels packed at a time, if there are as many: long runs, even if fewer offsets fit then.
constexpr int64_t kLeastChannels = 64;
// But so few if the images are wide and flat.
constexpr int64_t kFewestChannels = 8;
// 256 rows summed at a time: each packed pixel then serves as many multiply-adds.
constexpr BlockLimits kLimits{kPanelBytes, 256 << 10, kLeastChannels, 256};
// Rows of a chunk, if there are as many, where they lie next to each other in the target: of
// shorter runs each cache line would be written by several chunks. With many phases their sums go
// beyond the bound above, up to as many times; they are written once and read once.
constexpr int64_t kLeastRun = 32;

std::vector<int64_t> union_of_offsets(const AxisTaps& axis) {
  std::vector<int64_t> all;
  for (const PhaseClass& c : axis.classes)
    all.insert(all.end(), c.offsets.begin(), c.offsets.end());
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());
  return all;
}

int64_t index_of(const std::vector<int64_t>& sorted, int64_t value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

// Counts channels in pairs. Where those of a pair lie next to each other, and pairs are aligned, a
// pair is an element.
void pair_channels(GatherPlan& plan, int64_t pair) {
  const Problem& p = plan.params.problem;
  const auto count = [&](const void* data, int64_t& channel,
                         std::initializer_list<std::pair<int64_t*, int64_t>> others) {
    bool aligned =
        channel == 1 && reinterpret_cast<uintptr_t>(data) % (pair * plan.stored_bytes) == 0;
    for (const auto& [stride, size] : others) aligned &= size == 1 || *stride % pair == 0;
    if (!aligned) {
      channel *= pair;
      return false;
    }
    for (const auto& [stride, size] : others) *stride /= pair;
    return true;
  };
  auto& s = plan.source.stride;
  plan.source_as_is = count(plan.source.data, s[1],
                            {{&s[0], plan.batch}, {&s[2], plan.h.source}, {&s[3], plan.w.source}});
  WeightRef& w = plan.weight;
  plan.weight_as_is = count(w.data, w.channel,
                            {{&w.group, plan.groups},
                             {&w.row, plan.rows},
                             {&w.kernel_h, p.h.kernel},
                             {&w.kernel_w, p.w.kernel}});
  plan.target_as_is = false;
  plan.channels /= pair;
}

}  // namespace

GatherPlan make_gather(Op op, const Params& params, const PanelFormat& format, bool merged_h,
                       bool merged_w) {
  const Problem& p = params.problem;
  const int64_t group_in = p.c_in / p.groups, group_out = p.c_out / p.groups;
  const auto& ws = params.w.stride;
  GatherPlan plan{};
  plan.params = params;
  plan.op = op;
  plan.stored_bytes = format.stored_bytes;
  plan.channel_unit = format.channel_unit;
  plan.batch = p.batch;
  plan.groups = p.groups;
  if (op == Op::kForward) {
    plan.channels = group_in;
    plan.rows = group_out;
    plan.source = params.x;
    plan.target = params.y;
    plan.weight = {params.w.data, group_in * ws[0], ws[0], ws[1], ws[2], ws[3]};
    plan.h = forward_taps(p.h, merged_h);
    plan.w = forward_taps(p.w, merged_w);
  } else {
    plan.channels = group_out;
    plan.rows = group_in;
    plan.source = params.y;
    plan.target = params.x;
    plan.weight = {params.w.data, group_in * ws[0], ws[1], ws[0], ws[2], ws[3]};
    plan.h = grad_input_taps(p.h);
    plan.w = grad_input_taps(p.w);
  }
  if (plan.channels * plan.groups == 1)
    plan.source.stride[1] = 1;  // never used; says that channels are contiguous
  plan.source_as_is = plan.target_as_is = plan.weight_as_is =
      format.stored_bytes == format.element_bytes;
  if (format.channels > 1) pair_channels(plan, format.channels);
  list_offsets(plan);
  return plan;
}

void list_offsets(GatherPlan& plan) {
  plan.offsets_h = union_of_offsets(plan.h);
  plan.offsets_w = union_of_offsets(plan.w);
}

void pair_classes(GatherPlan& plan) {
  for (size_t ih = 0; ih < plan.h.classes.size(); ++ih)
    for (size_t iw = 0; iw < plan.w.classes.size(); ++iw) {
      const PhaseClass &h = plan.h.classes[ih], &w = plan.w.classes[iw];
      GatherClass c{static_cast<int64_t>(ih),
                    static_cast<int64_t>(iw),
                    static_cast<int64_t>(h.offsets.size() * w.offsets.size()),
                    {},
                    0,
                    0,
                    0};
      for (int64_t oh : h.offsets)
        for (int64_t ow : w.offsets)
          c.offset_at.push_back(index_of(plan.offsets_h, oh) *
                                    static_cast<int64_t>(plan.offsets_w.size()) +
                                index_of(plan.offsets_w, ow));
      c.padded_rows = round_up(plan.row_chunk * h.phases * w.phases, plan.row_width);
      c.first_row = plan.padded_rows;
      c.first_weight = plan.weights_per_channel;
      plan.padded_rows += c.padded_rows;
      plan.weights_per_channel += c.padded_rows * c.taps;
      const auto lacks_taps = [](const PhaseClass& axis) {
        return std::find(axis.k.begin(), axis.k.end(), -1) != axis.k.end();
      };
      plan.padded_weights |=
          c.padded_rows != plan.row_chunk * h.phases * w.phases || lacks_taps(h) || lacks_taps(w);
      plan.classes.push_back(c);
    }
}

namespace {

// At how many positions of an axis all offsets from `lowest` to `highest` read inside the source.
int64_t positions_inside(const AxisTaps& axis, int64_t lowest, int64_t highest) {
  const int64_t first = std::max<int64_t>(0, ceil_div(-lowest, axis.source_step));
  const int64_t last =
      std::min(axis.positions - 1, floor_div(axis.source - 1 - highest, axis.source_step));
  return std::max<int64_t>(0, last - first + 1);
}

// Taps that read inside the source, as a fraction of those the table lists.
double valid_fraction(const AxisTaps& axis) {
  int64_t listed = 0, valid = 0;
  for (const PhaseClass& c : axis.classes)
    for (int64_t offset : c.offsets) {
      valid += positions_inside(axis, offset, offset);
      listed += axis.positions;
    }
  return listed ? static_cast<double>(valid) / static_cast<double>(listed) : 1.0;
}

// Flat pixels: a vector that crosses cache lines is loaded twice, and channels lie strewn.
constexpr double kUnaligned = 1.18;
// Where a group's channels are a part of each pixel, lines that are read in place lie strewn too,
// and share few sets of the L1 cache.
constexpr double kSlices = 1.12;

// What flat packing would be like.
struct Flat {
  bool possible;
  int64_t channels;  // packed at a time
  int64_t shift;     // the largest distance of a tap
  double waste;      // positions computed for each that exists
  double copies;     // of an element, since blocks share rows
};

Flat flat_images(const GatherPlan& plan, bool rows_across, int64_t element_bytes) {
  const int64_t halo_h = GatherPlan::halo(plan.offsets_h, plan.h.source_step),
                halo_w = GatherPlan::halo(plan.offsets_w, plan.w.source_step);
  const int64_t shift = halo_h * (plan.w.positions + halo_w) + halo_w;
  // Each residue must be some tap's, and some of them two taps'.
  const bool shared = static_cast<int64_t>(plan.offsets_h.size()) >= plan.h.source_step &&
                      static_cast<int64_t>(plan.offsets_w.size()) >= plan.w.source_step &&
                      plan.offsets() > plan.residues();
  // What lies otherwise in memory is transposed, for lanes without a step alone. Pairs of channels
  // have a kernel of their own, which knows of flat lanes that lie in rows alone.
  const bool in_rows = plan.source.stride[3] == 1, together = plan.source.stride[1] == 1;
  const bool packable =
      rows_across ? plan.channel_unit == 1 && (in_rows || together)
                  : in_rows || (together && plan.residues() == 1 && plan.channel_unit == 1);
  if (!shared || !packable || plan.h.positions == 0 || plan.w.positions == 0) return {};
  // Pixels that fit the panel, halo included: in wide images, of fewer channels at a time.
  int64_t channels = std::clamp<int64_t>(plan.channels, 1, kLeastChannels), room;
  for (;; channels = ceil_div(channels, 2)) {
    room = kPanelBytes / element_bytes / plan.residues() / channels;
    if (shift + std::max(shift, kBlockPixels) <= room) break;
    if (channels <= kFewestChannels) return {};
  }
  const auto padded = [](int64_t positions, int64_t halo) {
    return static_cast<double>(positions + halo) / static_cast<double>(positions);
  };
  return {true, channels, shift,
          padded(plan.h.positions, halo_h) * padded(plan.w.positions, halo_w),
          static_cast<double>(room) / static_cast<double>(room - shift)};
}

// The part of the tiles that cannot be read where they are, where rows are lanes: those at the ends
// of rows, and any of which a tap would read outside.
double packed_fraction(const GatherPlan& plan, int64_t pixel_width) {
  if (!plan.source_as_is || plan.offsets() == 0) return 1;
  const int64_t h = positions_inside(plan.h, plan.offsets_h.front(), plan.offsets_h.back()),
                w = positions_inside(plan.w, plan.offsets_w.front(), plan.offsets_w.back());
  return 1 - static_cast<double>(h * (w / pixel_width * pixel_width)) /
                 static_cast<double>(std::max<int64_t>(1, plan.h.positions * plan.w.positions));
}

// `images` = 0 leaves out what a partly filled tile of pixels wastes.
Layout best_layout(const GatherPlan& plan, const TileShape* tiles, int tile_count, int lanes,
                   int64_t element_bytes, int64_t images) {
  const double positions =
      static_cast<double>(plan.h.positions) * static_cast<double>(plan.w.positions);
  const double channels = static_cast<double>(plan.channels),
               offsets = static_cast<double>(plan.offsets());
  const bool one_phase = plan.h.classes.size() == 1 && plan.h.classes[0].phases == 1 &&
                         plan.w.classes.size() == 1 && plan.w.classes[0].phases == 1;
  const bool by_phase = plan.rows > 1 && (plan.target.stride[1] == 1 || one_phase);
  // Rounding single elements to 16 bits takes instructions of its own.
  const double stored_element = kElement + (plan.stored_bytes < element_bytes ? kRounded : 0.0);
  const Flat flat_lanes = flat_images(plan, false, element_bytes),
             flat_rows = flat_images(plan, true, element_bytes);
  Layout best{false, by_phase, false, 0, std::numeric_limits<double>::max()};
  for (int across = 0; across < 2; ++across)
    for (int t = 0; t < tile_count; ++t) {
      const bool rows_across = across == 1;
      const int64_t row_width = rows_across ? tiles[t].lanes : tiles[t].rows;
      const int64_t pixel_width = rows_across ? tiles[t].rows : tiles[t].lanes;
      const double step = tiles[t].cycles;
      double multiply = 0, outputs = 0, contiguous = 1;
      for (const PhaseClass& h : plan.h.classes)
        for (const PhaseClass& w : plan.w.classes) {
          const int64_t rows = plan.rows * h.phases * w.phases;
          multiply += channels * static_cast<double>(h.offsets.size() * w.offsets.size()) *
                      static_cast<double>(ceil_div(rows, row_width)) * step /
                      static_cast<double>(pixel_width);
          outputs += static_cast<double>(rows);
          contiguous = static_cast<double>(by_phase ? std::min(plan.rows, row_width) : w.phases);
        }
      if (images > 0) {
        const auto pixels = static_cast<double>(images) * positions;
        multiply *=
            static_cast<double>(ceil_div(static_cast<int64_t>(pixels), pixel_width) * pixel_width) /
            pixels;
      }
      double pack, store;
      bool flat = false;
      if (rows_across) {
        const double crossing = packed_fraction(plan, pixel_width);
        const double element = plan.source.stride[1] <= 16                       ? kElement
                               : plan.w.source_step * plan.source.stride[3] < 16 ? kFarElement
                                                                                 : kLoneElement;
        pack = offsets * (plan.source.stride[1] == 1
                              ? crossing * (kRun + channels * kVectorCopied / lanes)
                              : channels * element);
        // Whole tiles of rows are written where the result lies.
        const bool in_place = plan.target_as_is && by_phase && plan.target.stride[1] == 1 &&
                              plan.rows % row_width == 0 &&
                              plan.params.activation == Activation::kNone;
        store = outputs * (in_place ? kVectorStored / lanes
                           : plan.target.stride[by_phase ? 1 : 3] == 1
                               ? kRun / contiguous + kVectorStored / lanes
                           : by_phase && plan.target.stride[3] == 1 ? kTransposed
                                                                    : stored_element);
        if (flat_rows.possible) {
          const double once =
              channels * flat_rows.waste * flat_rows.copies * static_cast<double>(plan.residues()) *
                  (plan.source.stride[1] == 1 ? kVectorCopied / lanes : kTransposed) +
              static_cast<double>(plan.h.source_step) * kRow /
                  static_cast<double>(plan.w.positions);
          // Tiles that are packed by themselves have segments of their own.
          const double listed =
              crossing * offsets * kListed *
              static_cast<double>(ceil_div(static_cast<int64_t>(outputs), row_width)) /
              static_cast<double>(pixel_width);
          const bool slices = plan.source_as_is && plan.groups > 1;
          flat = flat_rows.waste * (multiply + store) + once <
                 (slices ? kSlices : 1.0) * multiply + store + pack + listed;
          if (flat) {
            multiply *= flat_rows.waste;
            store *= flat_rows.waste;
            pack = once;
          } else {
            pack += listed;
          }
        }
      } else {
        // Contiguous runs end with the row. A step makes residues of it first, which all taps
        // share.
        const double row = kRow / static_cast<double>(plan.w.positions);
        const double residues = plan.w.source_step == 1 ? 0.0 : 3.0;
        const double far = plan.source.stride[3] < 16 ? kElement : kFarElement;
        const double copied =
            plan.source.stride[3] == 1 ? (1 + residues) * kVectorCopied / lanes : kTransposed;
        pack = offsets * channels *
               (plan.source.stride[3] == 1 ? (1 + residues) * kVectorCopied / lanes + row : far);
        store = outputs * (plan.target.stride[3] == 1 ? kVectorStored / lanes : kFarElement);
        // With a step, rows that hold a tile are better off: most of their tiles are written where
        // the result lies, and a tap begins anew less often.
        const bool narrow = plan.w.positions < pixel_width;
        if (flat_lanes.possible && (plan.residues() == 1 || narrow)) {
          const double once = channels * flat_lanes.waste * flat_lanes.copies *
                              static_cast<double>(plan.h.source_step) *
                              (static_cast<double>(plan.w.source_step) * copied + row);
          flat =
              flat_lanes.waste * (kUnaligned * multiply + store) + once < multiply + store + pack;
          if (flat) {
            multiply *= flat_lanes.waste * kUnaligned;
            store *= flat_lanes.waste;
            pack = once;
          }
        }
      }
      const double cycles = positions * (multiply + pack + store);
      if (cycles < best.cycles) best = {rows_across, by_phase, flat, t, cycles};
    }
  return best;
}

}  // namespace

void choose_blocks(GatherPlan& plan, int64_t element_bytes, int threads,
                   const BlockLimits& limits) {
  const int64_t panel_elements = limits.panel_bytes / element_bytes,
                sum_elements = limits.sum_bytes / element_bytes;
  const int64_t offsets = std::max<int64_t>(plan.offsets(), 1);
  const int64_t most =
      std::min(plan.most_channels,
               std::max(limits.least_channels, panel_elements / (offsets * kBlockPixels)));
  plan.channel_block =
      round_up(ceil_div(plan.channels, ceil_div(plan.channels, most)), plan.channel_unit);
  // Flat pixels serve all offsets.
  const bool all = plan.most_channels != std::numeric_limits<int64_t>::max();
  plan.offset_block =
      all ? offsets
          : std::min(offsets,
                     std::max<int64_t>(1, panel_elements / (plan.channel_block * kBlockPixels)));
  const int64_t offset_row = std::max<int64_t>(1, static_cast<int64_t>(plan.offsets_w.size()));
  if (plan.offset_block > offset_row)
    plan.offset_block = plan.offset_block / offset_row * offset_row;

  // Whether it is one does not matter to the order of summation. Rounded up, channels may be too
  // many.
  const Flat images = flat_images(plan, plan.rows_across, element_bytes);
  plan.flat =
      plan.flat && all && !plan.batch_innermost &&
      plan.channel_block * plan.residues() * (images.shift + kBlockPixels) <= panel_elements;
  if (plan.flat) {
    plan.flat_reach = images.shift;
    plan.h.positions += GatherPlan::halo(plan.offsets_h, plan.h.source_step);
    plan.w.positions += GatherPlan::halo(plan.offsets_w, plan.w.source_step);
  }

  const int64_t positions = plan.h.positions * plan.w.positions;
  plan.tiles = plan.batch_innermost ? positions * ceil_div(plan.batch, plan.pixel_width)
                                    : ceil_div(positions * plan.batch, plan.pixel_width);

  int64_t phases = 0;
  for (const PhaseClass& h : plan.h.classes)
    for (const PhaseClass& w : plan.w.classes) phases += h.phases * w.phases;
  // A block as large as panel and sums allow, but small enough that every thread has a few of them.
  const int64_t tasks = 4 * threads;
  const int64_t least_rows = std::max(phases, std::min(phases * plan.rows, limits.least_rows));
  const int64_t share =
      std::max(kBlockPixels, ceil_div(plan.tiles * plan.pixel_width * plan.groups, tasks));
  // Taps that a tile skips take no place in the cache.
  const double packed = static_cast<double>(plan.channel_block * plan.offset_block) *
                        (plan.batch_innermost ? plan.valid_fraction : 1.0);
  const int64_t fitting =
      plan.flat ? panel_elements / (plan.channel_block * plan.residues()) - images.shift
                : std::min(kMaxBlockPixels,
                           static_cast<int64_t>(static_cast<double>(panel_elements) / packed));
  const int64_t block_pixels = std::min({share, fitting, sum_elements / least_rows});
  plan.block_tiles = std::max<int64_t>(1, std::min(block_pixels / plan.pixel_width, plan.tiles));

  // Few blocks of pixels: spread the rows over the threads too, in chunks of about four tiles or
  // more; where there are not as many rows, in as many blocks as go round.
  const int64_t finest = std::max<int64_t>(1, plan.rows * phases / (4 * plan.row_width));
  int64_t blocks = ceil_div(plan.tiles, plan.block_tiles) * plan.groups;
  if (blocks < tasks && finest == 1) {
    plan.block_tiles = ceil_div(plan.tiles, ceil_div(round_up(blocks, threads), plan.groups));
    blocks = ceil_div(plan.tiles, plan.block_tiles) * plan.groups;
  }
  const int64_t rows_at_once =
      std::max(plan.rows_by_phase ? std::min(plan.rows, kLeastRun) : 1,
               sum_elements / (plan.block_tiles * plan.pixel_width * phases));
  const int64_t spread = blocks < tasks ? std::min(ceil_div(tasks, blocks), finest) : 1;
  // Chunks end with whole tiles where they can.
  const PhaseClass &h = plan.h.classes.front(), &w = plan.w.classes.front();
  const int64_t unit = plan.row_width / std::gcd(plan.row_width, h.phases * w.phases);
  plan.row_chunk = ceil_div(plan.rows, std::max(ceil_div(plan.rows, rows_at_once), spread));
  plan.row_chunk = std::min(plan.rows, round_up(plan.row_chunk, unit));
  plan.row_chunks = ceil_div(plan.rows, plan.row_chunk);
  // One position of many images: tasks that follow each other would write to the same cache lines,
  // unless to other rows.
  plan.chunks_per_task = blocks < tasks || plan.batch_innermost ? 1 : plan.row_chunks;
}

namespace {

// The images of a flat panel, and where its taps are.
void lay_out_flat(GatherPlan& plan, int64_t element_bytes) {
  constexpr int64_t kLine = 64, kSet = 4096;
  const int64_t pitch = plan.w.positions, step_h = plan.h.source_step, step_w = plan.w.source_step;
  // The last vector may reach beyond its image.
  plan.flat_residue =
      round_up(plan.block_tiles * plan.pixel_width + plan.flat_reach + kLine, kLine);
  if (plan.rows_across) plan.flat_residue *= step_w;
  plan.flat_channel = plan.residues() * plan.flat_residue;
  // Channels 4096 bytes apart would compete for one set of the L1 cache.
  if (plan.flat_channel * element_bytes % kSet == 0) plan.flat_channel += kLine / element_bytes;
  for (int64_t h : plan.offsets_h)
    for (int64_t w : plan.offsets_w) {
      const int64_t from_h = h - plan.offsets_h.front(), from_w = w - plan.offsets_w.front();
      const int64_t position = from_h / step_h * pitch + from_w / step_w, rh = from_h % step_h,
                    rw = from_w % step_w;
      plan.flat_at.push_back(plan.rows_across ? rh * plan.flat_residue + position * step_w + rw
                                              : (rh * step_w + rw) * plan.flat_residue + position);
    }
}

// Whether tiles may be read where they are.
bool reads_in_place(const GatherPlan& plan, int64_t element_bytes) {
  if (!plan.source_as_is || plan.batch_innermost) return false;
  if (!plan.rows_across) {
    // Channels are far apart, often a power of two, and a vector is hardly ever aligned. That costs
    // less than a copy only for pixels that are read once: by one tap of one tile of rows.
    int64_t taps = 0;
    for (const GatherClass& c : plan.classes) taps += c.taps * (c.padded_rows / plan.row_width);
    return plan.source.stride[3] == 1 && plan.w.source_step == 1 &&
           taps * plan.row_chunks <= plan.offsets();
  }
  // Rows 4096 bytes apart would all compete for one set of the L1 cache.
  return plan.source.stride[1] == 1 &&
         plan.w.source_step * plan.source.stride[3] * element_bytes % 4096 != 0;
}

// Whether sums may be written straight to the target: a vector must lie in one piece there, and the
// bias be a vector too. Invented NaNs cannot be repaired there, so no weight may be padding; nor
// is there an activation.
bool writes_in_place(const GatherPlan& plan) {
  if (!plan.target_as_is || plan.batch_innermost) return false;
  if (plan.params.activation != Activation::kNone) return false;
  if (plan.rows_across)
    return plan.target.stride[1] == 1 && plan.rows_by_phase && !plan.padded_weights &&
           plan.rows % plan.row_width == 0 && plan.row_chunk % plan.row_width == 0;
  return plan.target.stride[3] == 1 && plan.h.target_step == 1 && plan.w.target_step == 1 &&
         !plan.params.bias;
}

// Which side streams by. Weights stay in L1 while pixels do, unless
// - all weights stay there: then neighbouring lines of the target are written one after another;
// - pixels are lanes and flat: their taps overlap, but lie strewn.
bool pixels_stay(const GatherPlan& plan, int64_t element_bytes) {
  constexpr int64_t kWeightBytes = 24 << 10;
  return plan.rows_across
             ? plan.channel_block * plan.weights_per_channel * element_bytes <= kWeightBytes
             : plan.flat;
}

}  // namespace

Choice choose_merging(Op op, const Params& params, const TileShape* tiles, int tile_count,
                      const PanelFormat& format) {
  // Merging the phases of an axis packs fewer copies of the pixels and fills tiles with few rows,
  // at the price of zeros where phases have unequal taps.
  constexpr int64_t kMaxMergedPhases = 64;
  const auto may_merge = [&](const Axis& axis) {
    return op == Op::kForward && axis.stride > 1 &&
           axis.stride <= std::min(axis.out, kMaxMergedPhases);
  };
  const auto find = [&] {
    Choice best{false, false, {}};
    for (int option = 0; option < 4; ++option) {
      const bool h = option & 1, w = option & 2;
      if ((h && !may_merge(params.problem.h)) || (w && !may_merge(params.problem.w))) continue;
      const Layout layout = best_layout(make_gather(op, params, format, h, w), tiles, tile_count,
                                        format.lanes, format.element_bytes, 0);
      // Weights of merged phases are packed one by one, which a few percent do not pay for.
      if (option == 0 || layout.cycles < 0.95 * best.layout.cycles) best = {h, w, layout};
    }
    return best;
  };
  static Remembered<Choice> answers;
  Call call = describe(op, params, -1, 0, false);
  call.insert(call.end(), {format.lanes, format.element_bytes, format.channels});
  // Pairs of channels need not be aligned.
  for (const TensorRef* t : {&params.x, &params.w, &params.y})
    call.push_back(reinterpret_cast<intptr_t>(t->data) % (format.channels * format.stored_bytes));
  return answers(call, find);
}

GatherPlan plan_gather(Op op, const Params& params, const TileShape* tiles, int tile_count,
                       const PanelFormat& format, int threads) {
  const int lanes = format.lanes, element_bytes = format.element_bytes;
  const Choice choice = choose_merging(op, params, tiles, tile_count, format);
  GatherPlan plan = make_gather(op, params, format, choice.merged_h, choice.merged_w);
  for (int64_t h : plan.offsets_h)
    for (int64_t w : plan.offsets_w) plan.source_at.push_back(plan.source.at(0, 0, h, w));
  const Layout layout =
      best_layout(plan, tiles, tile_count, lanes, element_bytes, params.problem.batch);
  plan.rows_across = layout.rows_across;
  plan.rows_by_phase = layout.rows_by_phase;
  plan.flat = layout.flat;
  plan.tile = layout.tile;
  plan.pixel_width = layout.rows_across ? tiles[layout.tile].rows : tiles[layout.tile].lanes;
  plan.row_width = layout.rows_across ? tiles[layout.tile].lanes : tiles[layout.tile].rows;
  // Small images: more than a seventh of the taps read padding. Whole vectors of images pay for the
  // strided access; where neighbouring elements are not channels, which a tile needs anyway, if
  // more than a fifth do.
  plan.valid_fraction = valid_fraction(plan.h) * valid_fraction(plan.w);
  plan.batch_innermost =
      plan.batch >= lanes && plan.valid_fraction < (plan.source.stride[1] == 1 ? 0.85 : 0.8);
  // It decides the order of summation, so it must not depend on the batch.
  if (choice.layout.flat)
    plan.most_channels = flat_images(plan, choice.layout.rows_across, element_bytes).channels;
  choose_blocks(plan, element_bytes, threads, kLimits);
  pair_classes(plan);
  if (plan.flat) lay_out_flat(plan, element_bytes);
  plan.source_in_place = !plan.flat && reads_in_place(plan, element_bytes);
  plan.target_in_place = writes_in_place(plan);
  plan.pixels_stay = pixels_stay(plan, element_bytes);
  return plan;
}

}  // namespace cpu
}  // namespace deconv
