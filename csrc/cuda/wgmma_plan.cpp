// Tiles of pixels, shared memory, and the choice among the tiles of configs.h.
#include "wgmma_plan.h"

#include <limits>
#include <stdexcept>

namespace deconv {
namespace cuda {
namespace {

constexpr int kElementBytes = 2;

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
void cut_pixels(int pixels, int64_t batch, int64_t most_bytes, WgmmaPlan* p) {
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
    if (cost < best && shared_bytes(*p, s, 2, 2) <= most_bytes)
      best = cost, p->tiling = t, p->staged = s;
  }
}

WgmmaPlan fill(Op op, const Params& params, int tile_index, const Device& device) {
  const WgmmaTile& tile = kWgmmaTiles[tile_index];
  WgmmaPlan p{};
  static_cast<GatherPlan&>(p) = describe_gather(op, params, kElementBytes, tile.rows, tile.phases);
  p.tile = tile_index;
  p.weight_bytes = p.step_vectors * tile.rows * kVectorBytes;
  cut_pixels(tile.pixels, params.problem.batch, device.shared_bytes, &p);
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

bool rows_across(Op op, const Params& params) {
  const TensorRef& target = op == Op::kForward ? params.y : params.x;
  return target.stride[1] == 1 && target.stride[3] != 1;
}

}  // namespace

const char* decline_wgmma(Op op, const Params& params, int major, int minor) {
  if (op == Op::kGradWeight) return "grad_weight has no wgmma kernel";
  if (params.dtype != Dtype::kFloat16 && params.dtype != Dtype::kBFloat16)
    return "only float16 and bfloat16 have wgmma kernels";
  if (params.activation != Activation::kNone) return "wgmma kernels have no activations";
  if (major != 9 || minor != 0) return "wgmma needs a device of compute capability 9.0";
  return decline_gemm(op, params);
}

// No property of the batch or the device: results of a sample may not depend on them.
bool prefer_wgmma(Op op, const Params& params) {
  const Problem& q = params.problem;
  const bool forward = op == Op::kForward;
  const int64_t rows = (forward ? q.c_out : q.c_in) / q.groups,
                channels = (forward ? q.c_in : q.c_out) / q.groups;
  return rows >= 64 && channels >= 32 && q.h.in * q.w.in >= 256 && q.w.in >= kWgmmaGroupWidth;
}

WgmmaPlan plan_wgmma(Op op, const Params& params, const std::string& name, const Device& device) {
  std::string names;
  for (int i = 0; i < kWgmmaTileCount; ++i) {
    if (name == kWgmmaTiles[i].name) {
      const WgmmaPlan plan = fill(op, params, i, device);
      if (fits(plan)) return plan;
      throw std::invalid_argument("the tile '" + name +
                                  "' does not fit shared memory with this kernel, dilation and "
                                  "stride");
    }
    names += std::string(names.empty() ? "" : ", ") + kWgmmaTiles[i].name;
  }
  if (!name.empty()) throw std::invalid_argument("the tile '" + name + "' is not one of " + names);

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
  throw std::invalid_argument(
      "no wgmma tile fits shared memory with this kernel, dilation and stride");
}

}  // namespace cuda
}  // namespace deconv
