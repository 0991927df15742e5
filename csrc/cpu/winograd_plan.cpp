#include "winograd_plan.h"

#include <limits>

#include "gather_planning.h"

namespace deconv {
namespace cpu {
namespace {

// Sums are several for each result, and each takes few taps: they get more room than those of
// "gemm", and more channels at a time.
constexpr BlockLimits kLimits{256 << 10, 512 << 10, 128, 2304};
// All phases of a row of the result may be summed together: more would leave the cache.
constexpr int64_t kMostPhases = 16;
// Packing a kernel element of a group; where packed ones are more than stay in the last cache,
// memory decides, by bytes.
constexpr double kWeight = 2.2, kFarByte = 1.25, kBytesInCache = 16 << 20;
// What the weights cost is shared by the images of a batch. How many they are must not matter, so
// some number stands for all. Of weights beyond the cache fewer: there "gemm" is half as fast again
// for one image, and a tenth slower for many.
constexpr double kImages = 4, kImagesFar = 2;

double image_and_weights(double image, double elements, double bytes, bool far) {
  return far ? kImagesFar * image + elements * kFarByte * bytes
             : kImages * image + elements * kWeight;
}

// A vector of results, which "gemm" often writes while it multiplies; an element of a square that
// is transposed.
constexpr double kVectorWritten = 14;
constexpr double kTransposed = 1.5;

// Vectors are of rows of the product. Where not channels but pixels are contiguous in memory,
// squares are transposed.
bool channels_contiguous(const TensorRef& t) { return t.stride[1] == 1; }
bool pixels_contiguous(const TensorRef& t) { return t.stride[1] != 1 && t.stride[3] == 1; }

// A plan without sizes.
WinogradPlan make_plan(const GatherPlan& direct, size_t class_h, size_t class_w, size_t classes_w) {
  WinogradPlan plan{
      direct, winograd_axis(direct.h, class_h, 1), winograd_axis(direct.w, class_w, classes_w), {}};
  plan.gather.h = plan.h.taps;
  plan.gather.w = plan.w.taps;
  plan.gather.valid_fraction = 1;
  plan.gather.rows_across = true;
  plan.gather.rows_by_phase = true;  // there is one phase a class
  list_offsets(plan.gather);
  return plan;
}

// Where pixels are contiguous, all phases of a row of the result are stored together.
std::vector<WinogradPlan> make_plans(const GatherPlan& direct) {
  std::vector<WinogradPlan> plans;
  const size_t count = direct.w.classes.size(),
               at_once = channels_contiguous(direct.target) ? 1 : count;
  for (size_t h = 0; h < direct.h.classes.size(); ++h)
    for (size_t w = 0; w < count; w += at_once) plans.push_back(make_plan(direct, h, w, at_once));
  return plans;
}

// Weights that do not fit L2 are read again for each block of pixels, 8 bytes a cycle: for a tap, a
// channel and a position. A block is as large as kLimits, or those of "gemm", let it be.
constexpr double kWeightsInL2 = 256 << 10, kPairsOfBlock = 56, kPixelsOfBlock = 96;

double streamed(double taps, const GatherPlan& g, double block) {
  const double rows = static_cast<double>(g.rows);
  return taps * static_cast<double>(g.channels) * rows > kWeightsInL2 ? 0.5 * rows / block : 0.0;
}

double positions_of(const GatherPlan& plan) {
  return static_cast<double>(plan.h.positions) * static_cast<double>(plan.w.positions);
}

// By the model of gather_planning.h, for one image and group.
double cycles_of(const WinogradPlan& plan, const TileShape& tile, int lanes) {
  const GatherPlan& g = plan.gather;
  const double channels = static_cast<double>(g.channels);
  double taps = 0, classes = 0;
  for (const PhaseClass& h : g.h.classes)
    for (const PhaseClass& w : g.w.classes) {
      taps += static_cast<double>(h.offsets.size() * w.offsets.size());
      classes += 1;
    }
  const double tiles = static_cast<double>(ceil_div(g.rows, tile.lanes)) * tile.cycles / tile.rows;
  const double vectors = static_cast<double>(g.rows) / lanes;
  // Sums are loaded and stored with each block of channels, and once more when they are combined.
  const double blocks = static_cast<double>(ceil_div(g.channels, kLimits.least_channels));
  const double value = 2 * kRun + 4 * kVectorCopied * channels / lanes;
  // Transposed squares; of the source, for each row of values.
  const double reads = channels_contiguous(g.source)
                           ? 0.0
                           : kTransposed * channels * static_cast<double>(g.w.source_step) *
                                 static_cast<double>(g.offsets_h.size());
  const double store = 4 * static_cast<double>(g.rows) *
                       (channels_contiguous(g.target) ? kVectorWritten / lanes : kTransposed);
  return positions_of(g) *
         (taps * channels * tiles + classes * vectors * (blocks + 1) * kVectorStored + store +
          reads + static_cast<double>(g.offsets()) * value);
}

// One for all plans, since they share the pass over the weights.
Layout best_layout(const std::vector<WinogradPlan>& plans, const TileShape* tiles, int tile_count,
                   int lanes) {
  Layout best{true, true, false, false, false, 0, std::numeric_limits<double>::max()};
  for (int t = 0; t < tile_count; ++t) {
    double cycles = 0;
    for (const WinogradPlan& plan : plans) cycles += cycles_of(plan, tiles[t], lanes);
    if (cycles < best.cycles) {
      best.tile = t;
      best.cycles = cycles;
    }
  }
  return best;
}

}  // namespace

const char* winograd_declines(Op op, const Params& params) {
  if (params.dtype == Dtype::kInt64) return "it needs a floating point dtype";
  if (op == Op::kGradWeight) return "it computes forward and grad_input";
  const Problem& p = params.problem;
  if (p.h.kernel * p.w.kernel > kWinogradKernel) return "it needs kernels of up to 256 elements";
  if (p.h.stride * p.w.stride > kMostPhases) return "it needs stride_h * stride_w <= 16";
  const GatherPlan direct =
      make_gather(op, params, {4, 4, 1, Pairs::kNone, 1, false}, false, false);
  for (const TensorRef* t : {&direct.source, &direct.target})
    if (!channels_contiguous(*t) && !pixels_contiguous(*t))
      return "it needs tensors whose channels or rows are contiguous";
  const WinogradAxis h = winograd_axis(direct.h, 0, direct.h.classes.size()),
                     w = winograd_axis(direct.w, 0, direct.w.classes.size());
  if (h.values.empty() || w.values.empty()) return "no kernel element reaches the result";
  // One row of values of a pair of positions reads two rows of the source.
  int64_t span = 0, first = w.values.front().first, last = first;
  for (const WinogradValue& value : h.values) span = std::max(span, value.second - value.first + 1);
  for (const WinogradValue& value : w.values) last = std::max(last, value.second);
  const int64_t patch = 2 * (last - first + 1) * kLimits.least_channels;
  if (!h.shares && !w.shares) return "it needs taps of a phase that follow each other";
  return patch <= kWinogradPatch && span <= kWinogradSpan ? nullptr
                                                          : "its taps lie too far from each other";
}

bool winograd_pays(Op op, const Params& params, const TileShape* tiles, int tile_count,
                   const PanelFormat& format) {
  const GatherPlan direct = make_gather(op, params, format, false, false);
  const std::vector<WinogradPlan> plans = make_plans(direct);
  const double cycles = best_layout(plans, tiles, tile_count, format.lanes).cycles;
  double elements = 0;
  for (const WinogradPlan& plan : plans)
    elements += static_cast<double>(plan.h.weights.size() * plan.w.weights.size());
  const double weights = static_cast<double>(direct.channels * direct.rows);
  const double kernel = static_cast<double>(params.problem.h.kernel * params.problem.w.kernel);
  double taps = 0;
  for (const PhaseClass& h : direct.h.classes)
    for (const PhaseClass& w : direct.w.classes)
      taps += static_cast<double>(h.offsets.size() * w.offsets.size());
  const double gemm = choose_merging(op, params, tiles, tile_count, format).layout.cycles +
                      positions_of(direct) * taps * static_cast<double>(direct.channels) *
                          streamed(taps, direct, kPixelsOfBlock);
  const auto bytes = static_cast<double>(format.element_bytes);
  const bool far = weights * elements * bytes * static_cast<double>(direct.groups) > kBytesInCache;
  // Less than a tenth is not worth other roundings.
  return image_and_weights(cycles, weights * elements, bytes, far) <
         0.9 * image_and_weights(gemm, weights * kernel, bytes, far);
}

std::vector<WinogradPlan> plan_winograd(Op op, const Params& params, const TileShape* tiles,
                                        int tile_count, const PanelFormat& format, int threads) {
  std::vector<WinogradPlan> plans = make_plans(make_gather(op, params, format, false, false));
  const Layout layout = best_layout(plans, tiles, tile_count, format.lanes);
  int64_t row_chunk = plans.front().gather.rows,
          channel_block = std::min(plans.front().gather.channels, kLimits.least_channels);
  for (WinogradPlan& plan : plans) {
    GatherPlan& g = plan.gather;
    g.tile = layout.tile;
    g.pixel_width = tiles[g.tile].rows;
    g.row_width = tiles[g.tile].lanes;
    choose_blocks(g, format.element_bytes, threads, kLimits);
    row_chunk = std::min(row_chunk, g.row_chunk);
    channel_block = std::min(channel_block, g.channel_block);
  }
  for (WinogradPlan& plan : plans) {
    GatherPlan& g = plan.gather;
    g.row_chunk = row_chunk;
    g.row_chunks = ceil_div(g.rows, row_chunk);
    g.channel_block = channel_block;
    g.offset_block =
        std::max(g.offset_block, std::max<int64_t>(1, static_cast<int64_t>(g.offsets_w.size())));
    g.chunks_per_task = std::min(g.chunks_per_task, g.row_chunks);
    pair_classes(g);
    plan.stored = g;
    plan.stored.h.classes.resize(static_cast<size_t>(plan.h.targets));
    plan.stored.w.classes.resize(static_cast<size_t>(plan.w.targets));
    plan.stored.classes.clear();
    for (const GatherClass& c : g.classes)
      if (c.h < plan.h.targets && c.w < plan.w.targets) plan.stored.classes.push_back(c);
  }
  return plans;
}

}  // namespace cpu
}  // namespace deconv
