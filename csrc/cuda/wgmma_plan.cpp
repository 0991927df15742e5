// Tiles of pixels, shared memory, and the choice among the tiles of configs.h.
#include "wgmma_plan.h"

#include <limits>
#include <stdexcept>

namespace deconv {
namespace cuda {
namespace {

constexpr int kElementBytes = 2;
// Of a multiprocessor, a cycle: multiply-adds of wgmma and bytes from L2, as of 700 TFLOP/s and 5.5
// TB/s of an H100. An estimate, not measured.
constexpr double kProductRate = 1500, kCopyRate = 24;

int64_t aligned(int64_t bytes) { return ceil_div(bytes, 128) * 128; }

int64_t source_bytes(const StagedTile& s, int log_chunk) {
  return aligned(int64_t{copy_pitch(s.pixels, 1 << log_chunk)} * kVectorBytes << log_chunk);
}

int64_t bytes_before_weights(const StagedTile& s) {
  return aligned(4 * kMaxWgmmaStages * 8 + int64_t{s.pixels} * 8);
}

// Of shared memory, with so many stages of weights and buffers of the source.
int64_t shared_bytes(const WgmmaPlan& p, const StagedTile& s, int stages, int buffers) {
  return bytes_before_weights(s) + int64_t{stages} * p.weight_bytes +
         int64_t{buffers} * source_bytes(s, p.log_chunk);
}

// One row of the tile is 8 pixels; which part of the others are images? Among the cuts that fit, so
// that whether any does is no matter of the batch.
template <class Plan, class Fits>
void cut_pixels(int pixels, int64_t batch, const Fits& fits, Plan* p) {
  int log_groups = 0;
  while (kWgmmaGroupWidth << log_groups < pixels) ++log_groups;
  double best = std::numeric_limits<double>::infinity();
  for (int log_h = 0; log_h <= log_groups; ++log_h) {
    const int log_n = log_groups - log_h;
    const PixelTiling t{log_n,
                        log_h,
                        3,
                        static_cast<int32_t>(ceil_div(batch, int64_t{1} << log_n)),
                        static_cast<int32_t>(ceil_div(p->h.positions, int64_t{1} << log_h)),
                        static_cast<int32_t>(ceil_div(p->w.positions, kWgmmaGroupWidth))};
    StagedTile s{p->h.planes,
                 (1 << log_h) + p->h.span,
                 p->w.planes,
                 kWgmmaGroupWidth + p->w.span,
                 1 << log_n,
                 0,
                 0};
    s.pixels = s.images * s.planes_h * s.extent_h * s.planes_w * s.extent_w;
    const double cost = static_cast<double>(t.tiles()) * (pixels + 0.25 * s.pixels);
    if (cost < best && fits(s)) best = cost, p->tiling = t, p->staged = s;
  }
}

WgmmaPlan fill(Op op, const Params& params, int tile_index, const Device& device) {
  const WgmmaTile& tile = kWgmmaTiles[tile_index];
  WgmmaPlan p{};
  static_cast<GatherPlan&>(p) = describe_gather(op, params, kElementBytes, tile.rows, tile.phases);
  p.tile = tile_index;
  p.weight_bytes = p.step_vectors * tile.rows * kVectorBytes;
  const auto fits = [&](const StagedTile& s) {
    return shared_bytes(p, s, 2, 2) <= device.shared_bytes;
  };
  cut_pixels(tile.pixels, params.problem.batch, fits, &p);
  if (p.staged.pixels == 0) return p;  // none fits
  p.staged.pitch = copy_pitch(p.staged.pixels, 1 << p.log_chunk);
  p.source_bytes = static_cast<int32_t>(source_bytes(p.staged, p.log_chunk));
  p.pixels_at = 4 * kMaxWgmmaStages * 8;
  p.weights_at = static_cast<int32_t>(bytes_before_weights(p.staged));

  // Two of each at least, so that copies go on beside products; then what there is room for.
  p.weight_stages = p.source_buffers = 2;
  for (bool more = true; more;) {
    more = false;
    for (int32_t* count : {&p.source_buffers, &p.weight_stages}) {
      if (*count == kMaxWgmmaStages) continue;
      ++*count;
      if (shared_bytes(p, p.staged, p.weight_stages, p.source_buffers) <= device.shared_bytes)
        more = true;
      else
        --*count;
    }
  }
  p.source_at = p.weights_at + p.weight_stages * p.weight_bytes;
  p.shared_bytes = shared_bytes(p, p.staged, p.weight_stages, p.source_buffers);
  p.tile_count = static_cast<uint32_t>(std::min<int64_t>(p.tiles(), 0x7fffffff));
  p.blocks = std::min<int64_t>(p.tiles(), device.multiprocessors);
  return p;
}

bool fits(const WgmmaPlan& p) {
  return p.staged.pixels != 0 && p.tiles() <= 0x7fffffff && p.staged.pitch < 1 << 14 &&
         p.rows_padded < 1 << 26;
}

// The smallest number of rounds of one block a multiprocessor, each so long as its tiles of pixels
// and what it takes to begin and end.
int32_t choose_splits(int64_t blocks, int64_t tiles, int multiprocessors) {
  constexpr int kEnds = 4;  // tiles of pixels
  int32_t best = 1;
  double best_cost = std::numeric_limits<double>::infinity();
  const int64_t most = std::min(ceil_div(tiles, kEnds), 2 * multiprocessors / blocks + 1);
  for (int64_t splits = 1; splits <= std::max<int64_t>(1, most); ++splits) {
    const double cost = static_cast<double>(ceil_div(blocks * splits, multiprocessors) *
                                            (ceil_div(tiles, splits) + kEnds));
    if (cost < best_cost) best_cost = cost, best = static_cast<int32_t>(splits);
  }
  return best;
}

WgmmaWeightPlan fill_weight(const Params& params, int tile_index, const Device& device) {
  const WgmmaWeightTile& tile = kWgmmaWeightTiles[tile_index];
  WgmmaWeightPlan p{};
  static_cast<WeightPlan&>(p) =
      describe_weight(params, kElementBytes, tile.c_in, tile.c_out, 1, tile.taps);
  p.tile = tile_index;
  const auto bytes = [](int pitch, int channels) {
    return aligned(int64_t{pitch} * channels * kElementBytes);
  };
  const int dy_vectors = tile.c_out * kElementBytes / kVectorBytes;
  p.x_pitch = copy_pitch(kWeightPixels, tile.c_in * kElementBytes / kVectorBytes);
  p.dy_at = static_cast<int32_t>(bytes(p.x_pitch, tile.c_in));
  const auto before = [](const StagedTile& s) {
    return aligned(2 * kMaxWgmmaStages * 8 + int64_t{s.pixels + kWeightPixels} * 8);
  };
  const auto stage = [&](const StagedTile& s) {
    return p.dy_at + bytes(copy_pitch(s.pixels, dy_vectors), tile.c_out);
  };
  const auto most_stages = [&](const StagedTile& s) {
    return (device.shared_bytes - before(s)) / stage(s);
  };
  cut_pixels(
      kWeightPixels, params.problem.batch, [&](const StagedTile& s) { return most_stages(s) >= 2; },
      &p);
  if (p.staged.pixels == 0) return p;  // none fits
  p.staged.pitch = copy_pitch(p.staged.pixels, dy_vectors);
  p.stage_bytes = static_cast<int32_t>(stage(p.staged));
  p.stages = static_cast<int32_t>(std::min<int64_t>(most_stages(p.staged), kMaxWgmmaStages));
  p.tiles_at = static_cast<int32_t>(before(p.staged));
  p.shared_bytes = p.tiles_at + int64_t{p.stages} * p.stage_bytes;
  const int64_t blocks = int64_t{p.groups} * p.groups_h * p.groups_w * p.c_in_tiles * p.c_out_tiles;
  p.splits = choose_splits(std::max<int64_t>(1, blocks), p.tiling.tiles(), device.multiprocessors);
  p.blocks = blocks * p.splits;
  return p;
}

bool fits(const WgmmaWeightPlan& p) {
  return p.staged.pixels != 0 && p.blocks <= 0x7fffffff && p.staged.pitch < 1 << 14;
}

// Cycles of a multiprocessor.
double cost(const WgmmaWeightPlan& p, const Device& device) {
  const WgmmaWeightTile& tile = kWgmmaWeightTiles[p.tile];
  const double products = double{kWeightPixels} * tile.c_in * tile.c_out * tile.taps / kProductRate,
               copies = p.stage_bytes / kCopyRate;
  return static_cast<double>(ceil_div(p.blocks, device.multiprocessors) *
                             ceil_div(p.tiling.tiles(), p.splits)) *
         std::max(products, copies);
}

bool rows_across(Op op, const Params& params) {
  const TensorRef& target = op == Op::kForward ? params.y : params.x;
  return target.stride[1] == 1 && target.stride[3] != 1;
}

}  // namespace

const char* decline_wgmma(Op op, const Params& params, int major, int minor) {
  if (params.dtype != Dtype::kFloat16 && params.dtype != Dtype::kBFloat16)
    return "only float16 and bfloat16 have wgmma kernels";
  if (params.activation != Activation::kNone) return "wgmma kernels have no activations";
  if (major != 9 || minor != 0) return "wgmma needs a device of compute capability 9.0";
  return decline_gemm(op, params);
}

// No property of the batch or the device: results of a sample may not depend on them.
bool prefer_wgmma(Op op, const Params& params) {
  const Problem& q = params.problem;
  if (op == Op::kGradWeight && (params.x.stride[1] != 1 || params.y.stride[1] != 1)) return false;
  const bool forward = op == Op::kForward;
  const int64_t rows = (forward ? q.c_out : q.c_in) / q.groups,
                channels = (forward ? q.c_in : q.c_out) / q.groups;
  return rows >= (op == Op::kGradWeight ? 96 : 64) && channels >= 32 && q.h.in * q.w.in >= 256 &&
         q.w.in >= kWgmmaGroupWidth;
}

WgmmaWeightPlan plan_wgmma_weight(const Params& params, const std::string& name,
                                  const Device& device) {
  if (!name.empty()) {
    const WgmmaWeightPlan plan =
        fill_weight(params, find_tile(kWgmmaWeightTiles, ~0u, name), device);
    if (!fits(plan)) does_not_fit(name);
    return plan;
  }
  WgmmaWeightPlan best{};
  for (int i = 0; i < kWgmmaWeightTileCount; ++i) {
    const WgmmaWeightPlan plan = fill_weight(params, i, device);
    if (fits(plan) && (!fits(best) || cost(plan, device) < cost(best, device))) best = plan;
  }
  if (!fits(best)) does_not_fit("");
  return best;
}

WgmmaPlan plan_wgmma(Op op, const Params& params, const std::string& name, const Device& device) {
  if (!name.empty()) {
    const WgmmaPlan plan = fill(op, params, find_tile(kWgmmaTiles, ~0u, name), device);
    if (!fits(plan)) does_not_fit(name);
    return plan;
  }
  const Problem& q = params.problem;
  const bool across = rows_across(op, params), forward = op == Op::kForward;
  const int64_t stride = forward && !across ? std::min(q.w.stride, q.w.out) : 1;
  const int phases = stride <= 2 ? static_cast<int>(stride) : 4;
  const int64_t rows = (forward ? q.c_out : q.c_in) / q.groups;
  // Of the tiles for the layout and the stride the first that is not half empty, or else the last.
  WgmmaPlan last{};
  for (int i = 0; i < kWgmmaTileCount; ++i) {
    const WgmmaTile& tile = kWgmmaTiles[i];
    if (tile.rows_across != across || tile.phases != phases) continue;
    const WgmmaPlan plan = fill(op, params, i, device);
    if (!fits(plan)) continue;
    if (2 * rows > tile.rows) return plan;
    last = plan;
  }
  if (fits(last)) return last;
  does_not_fit("");
}

}  // namespace cuda
}  // namespace deconv
