// Tap tables, tiles of pixels, and the choice among the tiles of configs.h.
#include "gemm_plan.h"

#include <limits>
#include <stdexcept>

namespace deconv {
namespace cuda {
namespace {

int64_t floor_mod(int64_t a, int64_t b) { return a - floor_div(a, b) * b; }

int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

int log2_up(int64_t value) {
  int log = 0;
  while ((int64_t{1} << log) < value) ++log;
  return log;
}

struct SetTap {
  int64_t offset, k;
  int phase;  // within its set
};

Operand make_operand(const TensorRef& t, const Problem& q, bool is_x, int64_t element_bytes) {
  const int64_t vector = kVectorBytes / element_bytes;
  const int64_t h = is_x ? q.h.in : q.h.out, w = is_x ? q.w.in : q.w.out;
  const int64_t channels = (is_x ? q.c_in : q.c_out) / q.groups;
  Operand o{t.data,
            {t.stride[0], t.stride[1], t.stride[2], t.stride[3]},
            static_cast<int32_t>(q.batch),
            static_cast<int32_t>(h),
            static_cast<int32_t>(w),
            static_cast<int32_t>(channels),
            false,
            t.stride[1] == 1 && t.stride[3] != 1};
  const bool aligned =
      (q.batch == 1 || t.stride[0] % vector == 0) && (h == 1 || t.stride[2] % vector == 0) &&
      (w == 1 || t.stride[3] % vector == 0) && (q.groups == 1 || channels % vector == 0);
  o.vectors =
      t.stride[1] == 1 && aligned && reinterpret_cast<uintptr_t>(t.data) % kVectorBytes == 0;
  return o;
}

// Cuts the positions into tiles of 1 << log_pixels so that little is computed or staged in vain.
void cut_pixels(const AxisTable& h, const AxisTable& w, int64_t batch, int log_pixels,
                PixelTiling* tiling, StagedTile* staged) {
  double best = std::numeric_limits<double>::infinity();
  for (int log_w = 1; log_w <= log_pixels; ++log_w)
    for (int log_h = 0; log_w + log_h <= log_pixels; ++log_h) {
      const int log_n = log_pixels - log_w - log_h;
      const int64_t tiles_n = ceil_div(batch, int64_t{1} << log_n),
                    tiles_h = ceil_div(h.positions, int64_t{1} << log_h),
                    tiles_w = ceil_div(w.positions, int64_t{1} << log_w);
      StagedTile s{h.planes, (1 << log_h) + h.span, w.planes, (1 << log_w) + w.span, 1 << log_n, 0,
                   0};
      s.pixels = s.images * s.planes_h * s.extent_h * s.planes_w * s.extent_w;
      // Rows of fewer pixels make shorter copies and stores.
      const double cost = static_cast<double>(tiles_n * tiles_h * tiles_w) *
                          ((1 << log_pixels) + 0.25 * s.pixels) * (1 + 1.0 / (1 << log_w));
      if (cost < best) {
        best = cost;
        *tiling = {log_n,
                   log_h,
                   log_w,
                   static_cast<int32_t>(tiles_n),
                   static_cast<int32_t>(tiles_h),
                   static_cast<int32_t>(tiles_w)};
        *staged = s;
      }
    }
}

int most_group_taps(const AxisTable& axis) {
  int most = 1;
  for (int g = 0; g < axis.group[axis.sets]; ++g)
    most = std::max(most, axis.groups[g].tap[kMaxPhases] - axis.groups[g].tap[0]);
  return most;
}

int fewest_group_taps(const AxisTable& axis) {
  int fewest = kMaxTaps;
  for (int g = 0; g < axis.group[axis.sets]; ++g)
    fewest = std::min(fewest, axis.groups[g].tap[kMaxPhases] - axis.groups[g].tap[0]);
  return fewest;
}

// The number of vectors of channels that are staged at a time: as many as keep a step's weights
// within kStepVectors, and staged pixels in bounds where planes multiply them. It sets the order of
// summation, so it must not depend on the tile or the batch.
int choose_chunk(const AxisTable& h, const AxisTable& w, int64_t channel_vectors) {
  const int taps = most_group_taps(w), planes = h.planes * w.planes;
  int log = 1;
  while (log < 3 && taps << (log + 1) <= kStepVectors &&
         planes * taps << (log + 1) <= 2 * kStepVectors && (int64_t{1} << log) < channel_vectors)
    ++log;
  return log;
}

// Elements staged a cycle by a multiprocessor, over its multiply-adds a cycle on tensor cores with
// mma.sync, from the figures of an H100: (64 bytes / 2) and 1290.
constexpr double kStagingCost = 40;

}  // namespace

int32_t copy_pitch(int64_t pixels, int vectors) {
  vectors = std::min(vectors, 8);
  return static_cast<int32_t>(round_up(pixels, 16 / vectors) + 8 / vectors);
}

GatherPlan describe_gather(Op op, const Params& params, int64_t element_bytes, int tile_rows,
                           int phases) {
  const Problem& q = params.problem;
  const bool forward = op == Op::kForward;
  const int64_t group_in = q.c_in / q.groups, group_out = q.c_out / q.groups;

  GatherPlan p{};
  p.params = params;
  p.op = op;
  p.source = make_operand(forward ? params.x : params.y, q, forward, element_bytes);
  p.target = make_operand(forward ? params.y : params.x, q, !forward, element_bytes);
  p.bias = forward ? params.bias : nullptr;
  p.bias_stride = params.bias_stride;
  const int64_t* w = params.w.stride;
  p.w_group = group_in * w[0];
  p.w_channel = forward ? w[0] : w[1];
  p.w_row = forward ? w[1] : w[0];
  p.w_h = w[2];
  p.w_w = w[3];
  p.h = make_axis_table(forward ? forward_taps(q.h, false) : grad_input_taps(q.h), 1, kMaxTaps);
  p.w = make_axis_table(forward ? forward_taps(q.w, false) : grad_input_taps(q.w), phases,
                        kMaxStepTaps);
  p.groups = static_cast<int32_t>(q.groups);
  p.rows = static_cast<int32_t>(forward ? group_out : group_in);
  p.row_tiles = static_cast<int32_t>(ceil_div(p.rows, tile_rows));
  p.rows_padded = p.row_tiles * tile_rows;

  const int64_t vector = kVectorBytes / element_bytes,
                channel_vectors = ceil_div(p.source.channels, vector);
  p.log_chunk = choose_chunk(p.h, p.w, channel_vectors);
  p.chunks = static_cast<int32_t>(ceil_div(channel_vectors, int64_t{1} << p.log_chunk));
  p.vectors = p.chunks << p.log_chunk;
  p.step_vectors = most_group_taps(p.w) << p.log_chunk;
  return p;
}

WeightPlan describe_weight(const Params& params, int64_t element_bytes, int tile_c_in,
                           int tile_c_out, int max_group_taps_h, int max_group_taps_w) {
  const Problem& q = params.problem;
  WeightPlan p{};
  p.params = params;
  p.x = make_operand(params.x, q, true, element_bytes);
  p.dy = make_operand(params.y, q, false, element_bytes);
  p.h = make_axis_table(grad_input_taps(q.h), 1, max_group_taps_h);
  p.w = make_axis_table(grad_input_taps(q.w), 1, max_group_taps_w);
  p.groups = static_cast<int32_t>(q.groups);
  p.c_in = p.x.channels;
  p.c_out = p.dy.channels;
  p.c_in_tiles = static_cast<int32_t>(ceil_div(p.c_in, tile_c_in));
  p.c_out_tiles = static_cast<int32_t>(ceil_div(p.c_out, tile_c_out));
  p.c_in_padded = p.c_in_tiles * tile_c_in;
  p.c_out_padded = p.c_out_tiles * tile_c_out;
  p.groups_h = p.h.group[p.h.sets];
  p.groups_w = p.w.group[p.w.sets];
  p.tap_sets = 1;
  return p;
}

namespace {

GatherPlan fill_gather(Op op, const Params& params, Product product, int tile_index) {
  const GatherTile& tile = kGatherTiles[tile_index];
  const int element_bytes = kProducts[product].element_bytes;
  const int64_t vector = kVectorBytes / element_bytes;
  GatherPlan p = describe_gather(op, params, element_bytes, tile.rows, tile.phases);
  p.tile = tile_index;
  cut_pixels(p.h, p.w, params.problem.batch, log2_up(tile.pixels), &p.tiling, &p.staged);
  const int chunk = 1 << p.log_chunk;
  p.staged.pitch = copy_pitch(p.staged.pixels, chunk);
  // Steps t to t + kGatherStages - 1 are in flight, fewest_group_taps of them share a chunk.
  p.source_buffers = std::max(
      1, std::min((kGatherStages - 2) / std::max(1, fewest_group_taps(p.h)) + 2, p.chunks));
  const int64_t sets = std::max(1, p.h.sets * p.w.sets);
  const int64_t terms = p.vectors * vector * p.h.taps * p.w.taps / sets,
                groups = p.h.group[p.h.sets] * p.w.group[p.w.sets] / sets;
  p.splits =
      static_cast<int32_t>(std::max<int64_t>(1, std::min(ceil_div(terms, kMostTerms), groups)));
  p.blocks = p.tiles();
  p.shared_bytes =
      round_up(p.staged.pixels * 8, kVectorBytes) +
      static_cast<int64_t>(kVectorBytes) *
          (kGatherStages * p.step_vectors * tile.rows + p.source_buffers * chunk * p.staged.pitch);
  return p;
}

WeightPlan fill_weight(const Params& params, Product product, int tile_index,
                       const Device& device) {
  const WeightTile& tile = kWeightTiles[tile_index];
  const ArithmeticInfo& info = kProducts[product];
  const Problem& q = params.problem;

  WeightPlan p =
      describe_weight(params, info.element_bytes, tile.c_in, tile.c_out, kMaxTaps, kMaxTaps);
  p.tile = tile_index;
  p.tap_sets = static_cast<int32_t>(
      ceil_div(int64_t{most_group_taps(p.h)} * most_group_taps(p.w), tile.taps()));

  cut_pixels(p.h, p.w, q.batch, log2_up(kWeightPixels), &p.tiling, &p.staged);
  // 16 bits: ldmatrix takes any pitch. Wider types are read a word at a time.
  const auto pitch = [&](int64_t pixels, int channels) {
    return info.element_bytes == 2 ? copy_pitch(pixels, channels / 8)
                                   : static_cast<int32_t>(round_up(pixels, 8) + 4);
  };
  p.staged.pitch = pitch(p.staged.pixels, tile.c_out);
  p.x_pitch = pitch(kWeightPixels, tile.c_in);
  p.shared_bytes = round_up((p.staged.pixels + kWeightPixels) * 8, kVectorBytes) +
                   static_cast<int64_t>(kWeightStages) * info.element_bytes *
                       (int64_t{tile.c_in} * p.x_pitch + int64_t{tile.c_out} * p.staged.pitch);
  const int64_t blocks = static_cast<int64_t>(q.groups) * p.groups_h * p.groups_w * p.tap_sets *
                         p.c_in_tiles * p.c_out_tiles;
  // Two blocks a multiprocessor, each with at least four tiles of pixels to fill its pipeline.
  const int64_t wanted =
      ceil_div(int64_t{2} * device.multiprocessors, std::max<int64_t>(1, blocks));
  p.splits =
      static_cast<int32_t>(std::max<int64_t>(1, std::min(wanted, ceil_div(p.tiling.tiles(), 4))));
  p.blocks = blocks * p.splits;
  return p;
}

template <class Plan>
bool fits(const Plan& plan, const Device& device) {
  return plan.shared_bytes <= device.shared_bytes && plan.blocks <= 0x7fffffff;
}

// Phases that should share a thread: a thread then writes whole runs of an NCHW row. It sets the
// order of summation, so it must not depend on the batch.
int wanted_phases(Op op, const Problem& q, unsigned compiled) {
  const int64_t phases = op == Op::kForward ? std::min(q.w.stride, q.w.out) : 1;
  const int wanted = phases <= 2 ? static_cast<int>(phases) : 4;
  for (int i = 0; i < kGatherTileCount; ++i)
    if ((compiled >> i & 1) && !kGatherTiles[i].rows_across && kGatherTiles[i].phases == wanted)
      return wanted;
  return 2;
}

}  // namespace

void does_not_fit(const std::string& name) {
  throw std::invalid_argument(
      (name.empty() ? "no tile fits" : "the tile '" + name + "' does not fit") +
      " shared memory with this kernel, dilation and stride");
}

AxisTable make_axis_table(const AxisTaps& taps, int phases, int max_group_taps) {
  AxisTable t{};
  t.source = static_cast<int32_t>(taps.source);
  t.target = static_cast<int32_t>(taps.target);
  t.source_step = static_cast<int32_t>(taps.source_step);
  t.target_step = static_cast<int32_t>(taps.target_step);
  t.positions = static_cast<int32_t>(taps.positions);
  t.planes = 1;
  const int classes = static_cast<int>(taps.classes.size());
  int groups = 0;
  for (int first = 0; first < classes; first += phases) {
    t.phase[t.sets] = static_cast<int8_t>(taps.classes[first].first_phase);
    t.group[t.sets] = static_cast<int8_t>(groups);
    std::vector<SetTap> list;
    for (int c = first; c < std::min(first + phases, classes); ++c)
      for (size_t i = 0; i < taps.classes[c].offsets.size(); ++i)
        list.push_back({taps.classes[c].offsets[i], taps.classes[c].k[i], c - first});
    const auto plane_first = [&](const SetTap& a, const SetTap& b) {
      const int64_t ra = floor_mod(a.offset, t.source_step),
                    rb = floor_mod(b.offset, t.source_step);
      return ra != rb ? ra < rb : a.offset < b.offset;
    };
    std::stable_sort(list.begin(), list.end(), plane_first);
    for (size_t begin = 0; begin < list.size();) {
      TapGroup& g = t.groups[groups++];
      size_t end = begin;
      while (end < list.size()) {
        size_t same = end;  // taps of one offset stay together
        while (same < list.size() && list[same].offset == list[end].offset) ++same;
        if (end > begin && static_cast<int>(same - begin) > max_group_taps) break;
        const int64_t shift = g.planes ? list[end].offset - g.base[g.planes - 1] : -1;
        if (g.planes == 0 || shift % t.source_step != 0 || shift > kMaxSpan * t.source_step) {
          if (g.planes == kMaxPlanes) break;
          g.base[g.planes++] = static_cast<int32_t>(list[end].offset);
        }
        const int plane = g.planes - 1;
        for (; end < same; ++end) list[end].offset -= g.base[plane], list[end].k |= plane << 16;
      }
      int8_t at = static_cast<int8_t>(t.taps);
      for (int phase = 0; phase < kMaxPhases; ++phase) {
        g.tap[phase] = at;
        for (size_t i = begin; i < end; ++i) {
          if (list[i].phase != phase) continue;
          t.k[at] = static_cast<int8_t>(list[i].k & 0xffff);
          t.plane[at] = static_cast<int8_t>(list[i].k >> 16);
          t.step[at] = static_cast<int8_t>(list[i].offset / t.source_step);
          t.span = std::max<int32_t>(t.span, t.step[at]);
          ++at;
        }
      }
      g.tap[kMaxPhases] = at;
      t.taps = at;
      t.planes = std::max<int32_t>(t.planes, g.planes);
      begin = end;
    }
    ++t.sets;
    t.phase[t.sets] =
        static_cast<int8_t>(taps.classes[std::min(first + phases, classes) - 1].first_phase + 1);
    t.group[t.sets] = static_cast<int8_t>(groups);
  }
  return t;
}

const char* decline_gemm(Op op, const Params& params) {
  const Problem& q = params.problem;
  if (params.dtype == Dtype::kInt64) return "integers have no matrix kernel";
  for (const Axis* axis : {&q.h, &q.w}) {
    static_assert(kMaxTaps == 64, "see the message");
    if (axis->kernel > kMaxTaps || axis->stride > kMaxTaps)
      return "kernel and stride may be at most 64";
    if (axis->pad + axis->dilation * axis->kernel > 8192)
      return "padding and dilation * kernel may be at most 8192";
    if (std::max(axis->in, axis->out) > (1 << 24)) return "an axis is longer than 2^24";
  }
  if (q.batch > (1 << 30) || q.c_in > (1 << 24) || q.c_out > (1 << 24))
    return "batch or channels are too many for 32-bit indices";
  const auto far = [](const TensorRef& t, int64_t h, int64_t w) {
    const auto reach = [](int64_t stride, int64_t count) {
      return std::abs(stride) * std::max<int64_t>(0, count - 1);
    };
    return reach(t.stride[2], h) + reach(t.stride[3], w) + 128 * std::abs(t.stride[0]) >=
           0x7fffffff;
  };
  if ((op != Op::kGradInput && far(params.x, q.h.in, q.w.in)) ||
      (op != Op::kForward && far(params.y, q.h.out, q.w.out)))
    return "an image spans more than 2^31 elements";
  return nullptr;
}

GatherPlan plan_gather(Op op, const Params& params, Product product, const std::string& name,
                       const Device& device) {
  const unsigned compiled = kProducts[product].gather_tiles;
  if (!name.empty()) {
    GatherPlan plan = fill_gather(op, params, product, find_tile(kGatherTiles, compiled, name));
    if (!fits(plan, device)) does_not_fit(name);
    return plan;
  }
  const TensorRef& target = op == Op::kForward ? params.y : params.x;
  const bool rows_across = target.stride[1] == 1 && target.stride[3] != 1;
  const int phases = rows_across ? 1 : wanted_phases(op, params.problem, compiled);
  GatherPlan best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kGatherTileCount; ++i) {
    const GatherTile& tile = kGatherTiles[i];
    if (!(compiled >> i & 1) || tile.rows_across != rows_across || tile.phases != phases) continue;
    const GatherPlan plan = fill_gather(op, params, product, i);
    if (!fits(plan, device)) continue;
    // Rounds of one block a multiprocessor; of a block, multiply-adds and copies a channel.
    const double taps =
        static_cast<double>(plan.h.taps * plan.w.taps) / std::max(1, plan.h.sets * plan.w.sets);
    const int64_t blocks = plan.blocks * plan.splits;
    const double cost = static_cast<double>(ceil_div(blocks, device.multiprocessors)) *
                        (tile.rows * tile.pixels * taps / tile.rate +
                         kStagingCost * (plan.staged.pixels + tile.rows * taps));
    if (cost < best_cost) best_cost = cost, best = plan;
  }
  if (best_cost == std::numeric_limits<double>::infinity()) does_not_fit("");
  return best;
}

WeightPlan plan_weight(const Params& params, Product product, const std::string& name,
                       const Device& device) {
  const unsigned compiled = kProducts[product].weight_tiles;
  if (!name.empty()) {
    WeightPlan plan = fill_weight(params, product, find_tile(kWeightTiles, compiled, name), device);
    if (!fits(plan, device)) does_not_fit(name);
    return plan;
  }
  WeightPlan best{};
  double best_cost = std::numeric_limits<double>::infinity();
  for (int i = 0; i < kWeightTileCount; ++i) {
    if (!(compiled >> i & 1)) continue;
    const WeightTile& tile = kWeightTiles[i];
    const WeightPlan plan = fill_weight(params, product, i, device);
    if (!fits(plan, device)) continue;
    const double tiles = static_cast<double>(ceil_div(plan.tiling.tiles(), plan.splits));
    const double cost =
        static_cast<double>(ceil_div(plan.blocks, device.multiprocessors)) * tiles *
        (kWeightPixels * tile.c_in * tile.c_out * tile.taps() / tile.rate +
         kStagingCost * (kWeightPixels * tile.c_in + plan.staged.pixels * tile.c_out));
    if (cost < best_cost) best_cost = cost, best = plan;
  }
  if (best_cost == std::numeric_limits<double>::infinity()) does_not_fit("");
  return best;
}

}  // namespace cuda
}  // namespace deconv
