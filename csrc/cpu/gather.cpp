// The plan of a gather (gather.h): its operands and tap tables, its blocks, and where everything
// lies in them. The model that chooses its layout and tile is in gather_model.cpp.
#include <initializer_list>
#include <limits>
#include <numeric>
#include <utility>

#include "gather_planning.h"
#include "output_pool.h"

namespace deconv {
namespace cpu {
namespace {

// And at most so many pixels of a block.
constexpr int64_t kMaxBlockPixels = 384;
// 256 rows summed at a time: each packed pixel then serves as many multiply-adds.
constexpr BlockLimits kLimits{kPanelBytes, 256 << 10, kLeastChannels, 256};
// Rows of a chunk, if there are as many, where they lie next to each other in the target: of
// shorter runs each cache line would be written by several chunks. With many phases their sums go
// beyond the bound above, up to as many times; they are written once and read once.
constexpr int64_t kLeastRun = 32;

void sort_once(std::vector<int64_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

std::vector<int64_t> union_of_offsets(const AxisTaps& axis) {
  std::vector<int64_t> all;
  for (const PhaseClass& c : axis.classes)
    all.insert(all.end(), c.offsets.begin(), c.offsets.end());
  sort_once(all);
  return all;
}

int64_t index_of(const std::vector<int64_t>& sorted, int64_t value) {
  return std::lower_bound(sorted.begin(), sorted.end(), value) - sorted.begin();
}

// Counts channels in pairs. Where those of a pair lie next to each other, and pairs are aligned, a
// pair is an element.
void pair_channels(GatherPlan& plan) {
  constexpr int64_t pair = 2;
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
  plan.channels /= pair;
}

// Counts the taps of h in pairs: of each phase the first and the second, the third and the fourth,
// as long as their rows of the source are rows_apart.
void pair_taps(GatherPlan& plan) {
  const Problem& p = plan.params.problem;
  const bool forward = plan.op == Op::kForward;
  plan.rows_apart = forward ? 1 : p.h.dilation;
  plan.h.source += plan.rows_apart;
  for (PhaseClass& c : plan.h.classes) {
    const std::vector<int64_t> offsets = std::exchange(c.offsets, {}), k = std::exchange(c.k, {});
    const auto has_odd = [&](size_t i) {
      return i + 1 < offsets.size() && offsets[i + 1] == offsets[i] + plan.rows_apart;
    };
    std::vector<size_t> evens;  // of offsets
    for (size_t i = 0; i < offsets.size(); i += has_odd(i) ? 2 : 1) evens.push_back(i);
    for (size_t i : evens) c.offsets.push_back(offsets[i] + plan.rows_apart);
    for (size_t phase = 0; phase < static_cast<size_t>(c.phases); ++phase)
      for (size_t i : evens) {
        const int64_t* pair = &k[phase * offsets.size() + i];
        const std::pair<int64_t, int64_t> taps{pair[0], has_odd(i) ? pair[1] : -1};
        const bool any = taps.first >= 0 || taps.second >= 0;
        c.k.push_back(any ? static_cast<int64_t>(plan.tap_pairs.size()) : -1);
        if (any) plan.tap_pairs.push_back(taps);
        plan.padded_weights |= taps.first < 0 || taps.second < 0;
      }
  }
  plan.kernel_h = static_cast<int64_t>(plan.tap_pairs.size());
  const int64_t kernel = plan.kernel_h * p.w.kernel, filters = p.c_out / p.groups * kernel;
  plan.weight = {nullptr,
                 p.c_in / p.groups * filters,
                 forward ? filters : kernel,
                 forward ? kernel : filters,
                 p.w.kernel,
                 1};
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
  plan.target_as_is = format.stored_bytes == format.element_bytes;
  plan.source_as_is = plan.target_as_is;
  plan.weight_as_is = plan.target_as_is || format.pairs == Pairs::kTaps;
  plan.rounds = !plan.target_as_is && format.rounds;
  plan.kernel_h = p.h.kernel;
  if (format.pairs == Pairs::kChannels) pair_channels(plan);
  if (format.pairs == Pairs::kTaps) pair_taps(plan);
  list_offsets(plan);
  return plan;
}

void list_offsets(GatherPlan& plan) {
  plan.offsets_h = union_of_offsets(plan.h);
  plan.offsets_w = union_of_offsets(plan.w);
  plan.residues_h.clear();
  for (int64_t offset : plan.offsets_h)
    plan.residues_h.push_back((offset - plan.offsets_h.front()) % plan.h.source_step);
  sort_once(plan.residues_h);
}

bool lacks_taps(const PhaseClass& axis) {
  return std::find(axis.k.begin(), axis.k.end(), -1) != axis.k.end();
}

bool takes_turns(const GatherPlan& plan, int64_t row_width) {
  if (!plan.target_as_is || plan.params.activation != Activation::kNone ||
      plan.target.stride[3] != 1 || plan.w.classes.size() != 1 || plan.offsets() != 1)
    return false;
  for (const PhaseClass& h : plan.h.classes)
    if (lacks_taps(h)) return false;
  const PhaseClass& w = plan.w.classes.front();
  return (w.phases == 2 || w.phases == 4) && w.phases == plan.w.target_step && !lacks_taps(w) &&
         row_width % w.phases == 0;
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
      plan.padded_weights |=
          c.padded_rows != plan.row_chunk * h.phases * w.phases || lacks_taps(h) || lacks_taps(w);
      plan.classes.push_back(c);
    }
}

void choose_blocks(GatherPlan& plan, int64_t element_bytes, int threads,
                   const BlockLimits& limits) {
  const int64_t panel_elements = limits.panel_bytes / element_bytes,
                sum_elements = limits.sum_bytes / element_bytes;
  const int64_t offsets = std::max<int64_t>(plan.offsets(), 1);
  const int64_t most =
      plan.by_channel
          ? 1
          : std::min(plan.most_channels,
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
      const int64_t position = from_h / step_h * pitch + from_w / step_w,
                    rh = index_of(plan.residues_h, from_h % step_h), rw = from_w % step_w;
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

// Whether sums may be written straight to the target: a vector must lie in one piece there, or with
// those of the other phases, and the bias be a vector too. Invented NaNs cannot be repaired there,
// so no weight may be padding; nor is there an activation.
bool writes_in_place(const GatherPlan& plan) {
  if (plan.batch_innermost || plan.params.activation != Activation::kNone) return false;
  // What is rounded is a whole sum.
  const bool whole = plan.channel_block >= plan.channels && plan.offset_block >= plan.offsets();
  if (!plan.target_as_is && !(plan.rounds && plan.rows_across && whole)) return false;
  if (plan.rows_across)
    return plan.target.stride[1] == 1 && plan.rows_by_phase && !plan.padded_weights &&
           plan.rows % plan.row_width == 0 && plan.row_chunk % plan.row_width == 0;
  return plan.target_in_turns || (plan.target.stride[3] == 1 && plan.h.target_step == 1 &&
                                  plan.w.target_step == 1 && !plan.params.bias);
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

// Small images: whether pixels are numbered position by position, so that taps that read padding
// are skipped. Where rows are lanes, if more than a seventh of the taps do (a fifth, where
// neighbouring elements are not channels, which a tile needs anyway). Where pixels are, each
// element comes from another image, which has to be worth the multiply-adds.
bool skips_padding(const GatherPlan& plan, int lanes) {
  if (plan.valid_fraction >= (plan.source.stride[1] == 1 ? 0.85 : kFewPadding)) return false;
  if (plan.rows_across) return true;
  double products = 0;  // of an element that is packed
  for (const PhaseClass& h : plan.h.classes)
    for (const PhaseClass& w : plan.w.classes)
      products += static_cast<double>(h.offsets.size() * w.offsets.size()) *
                  static_cast<double>(h.phases * w.phases * plan.rows);
  products /= static_cast<double>(std::max<int64_t>(1, plan.offsets()));
  return (1 - plan.valid_fraction) * products / (2 * lanes) > kFarElement;
}

}  // namespace

bool has_rows_across(Op op, const Params& params, const TileShape* tiles, int tile_count,
                     const PanelFormat& format) {
  return choose_merging(op, params, tiles, tile_count, format).layout.rows_across;
}

GatherPlan plan_gather(Op op, const Params& params, const TileShape* tiles, int tile_count,
                       const PanelFormat& format, int threads) {
  const int lanes = format.lanes, element_bytes = format.element_bytes;
  const Choice choice = choose_merging(op, params, tiles, tile_count, format);
  GatherPlan plan = make_gather(op, params, format, choice.merged_h, choice.merged_w);
  for (int64_t h : plan.offsets_h)
    for (int64_t w : plan.offsets_w) plan.source_at.push_back(plan.source.at(0, 0, h, w));
  const Layout layout = best_layout(plan, tiles, tile_count, lanes, element_bytes,
                                    params.problem.batch, choice.layout.by_channel);
  plan.rows_across = layout.rows_across;
  plan.rows_by_phase = layout.rows_by_phase;
  plan.flat = layout.flat;
  plan.tile = layout.tile;
  plan.pixel_width = layout.rows_across ? tiles[layout.tile].rows : tiles[layout.tile].lanes;
  plan.row_width = layout.rows_across ? tiles[layout.tile].lanes : tiles[layout.tile].rows;
  plan.valid_fraction = valid_fraction(plan.h) * valid_fraction(plan.w);
  plan.batch_innermost = plan.batch >= lanes && skips_padding(plan, lanes);
  // It decides the order of summation, so it must not depend on the batch.
  plan.by_channel = choice.layout.by_channel;
  if (choice.layout.flat)
    plan.most_channels = flat_images(plan, choice.layout.rows_across, element_bytes).channels;
  choose_blocks(plan, element_bytes, threads, kLimits);
  pair_classes(plan);
  if (plan.flat) lay_out_flat(plan, element_bytes);
  plan.source_in_place = !plan.flat && reads_in_place(plan, element_bytes);
  plan.target_in_turns = layout.in_turns && !plan.batch_innermost;
  plan.target_in_place = writes_in_place(plan);
  plan.pixels_stay = pixels_stay(plan, element_bytes);
  plan.streams = outgrows_caches(result_elements(op, params.problem) * plan.stored_bytes);
  return plan;
}

}  // namespace cpu
}  // namespace deconv
