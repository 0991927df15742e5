// Arguments and launch shapes of the direct kernels.
#include "direct_plan.h"

#include <limits>

namespace deconv {
namespace cuda {
namespace direct {
namespace {

constexpr int64_t kMostOffset = std::numeric_limits<int32_t>::max();
constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();
// Enough blocks for every multiprocessor of a large GPU to hold eight; beyond, a block takes
// several tiles of rows and stages its weights once for them.
constexpr int64_t kEnoughBlocks = 8 * 132;
constexpr int kMostRowSteps = 8;

const char* axis_args(const AxisTaps& table, AxisArgs& args) {
  if (table.classes.size() > kMostTaps) return "it needs strides of at most 64";
  args = {static_cast<int32_t>(table.source),
          static_cast<int32_t>(table.target),
          static_cast<int32_t>(table.source_step),
          static_cast<int32_t>(table.target_step),
          static_cast<int32_t>(table.positions),
          static_cast<int32_t>(table.classes.size()),
          {},
          {},
          {}};
  int taps = 0;
  for (size_t r = 0; r < table.classes.size(); ++r) {
    const PhaseClass& phase = table.classes[r];
    for (size_t i = 0; i < phase.offsets.size(); ++i, ++taps) {
      if (taps == kMostTaps) return "it needs kernels of at most 64 taps on an axis";
      args.k[taps] = static_cast<int16_t>(phase.k[i]);
      args.offset[taps] = static_cast<int32_t>(phase.offsets[i]);
    }
    args.begin[r + 1] = static_cast<int16_t>(taps);
  }
  return nullptr;
}

// Largest offset within one channel plane.
int64_t extent(const TensorRef& t, int64_t h, int64_t w) {
  return std::max<int64_t>(h - 1, 0) * std::abs(t.stride[2]) +
         std::max<int64_t>(w - 1, 0) * std::abs(t.stride[3]);
}

bool fits_int32(const Axis& axis) {
  return std::max({axis.in, axis.out, axis.in * axis.stride, axis.kernel * axis.dilation}) +
             axis.pad <
         kMostOffset / 2;
}

// Whether vectors of n elements along `axis` are aligned from every index of the other axes.
bool aligned(const void* data, const int64_t (&stride)[4], int axis, int n, int element_bytes) {
  if (n == 1 || stride[axis] != 1) return false;
  for (int i = 0; i < 4; ++i)
    if (i != axis && stride[i] % n != 0) return false;
  return reinterpret_cast<uintptr_t>(data) % (n * element_bytes) == 0;
}

int balanced(int64_t count, int64_t most) {  // lanes so that tiles of them are equally full
  most = std::max<int64_t>(1, std::min(count, most));
  return static_cast<int>(ceil_div(count, ceil_div(count, most)));
}

}  // namespace

const char* too_large(const Params& p) {
  const Problem& q = p.problem;
  if (!fits_int32(q.h) || !fits_int32(q.w) || extent(p.x, q.h.in, q.w.in) > kMostOffset ||
      extent(p.y, q.h.out, q.w.out) > kMostOffset)
    return "it needs planes of less than 2^31 elements";
  if (q.c_in > kMostOffset || q.c_out > kMostOffset || q.batch > kMostOffset)
    return "it needs less than 2^31 channels and samples";
  return nullptr;
}

const char* gather_args(Op op, const Params& p, GatherArgs& a) {
  const Problem& q = p.problem;
  if (p.dtype == Dtype::kInt64) return "it needs a floating point dtype";
  if (const char* why = too_large(p)) return why;
  const bool forward = op == Op::kForward;
  const TensorRef &source = forward ? p.x : p.y, &target = forward ? p.y : p.x;
  if (const char* why =
          axis_args(forward ? forward_taps(q.h, false) : grad_input_taps(q.h), a.rows))
    return why;
  if (const char* why =
          axis_args(forward ? forward_taps(q.w, false) : grad_input_taps(q.w), a.columns))
    return why;
  if (q.w.kernel > kMostTaps) return "it needs kernels of at most 64 columns";
  a.source = source.data, a.weight = p.w.data, a.target = target.data;
  a.bias = forward ? p.bias : nullptr;
  a.bias_stride = p.bias_stride;
  a.activation = p.activation, a.negative_slope = p.negative_slope;
  std::copy_n(source.stride, 4, a.source_stride);
  std::copy_n(target.stride, 4, a.target_stride);
  const int64_t group_in = q.c_in / q.groups, group_out = q.c_out / q.groups;
  a.weight_group = group_in * p.w.stride[0];
  a.weight_source = p.w.stride[forward ? 0 : 1];
  a.weight_target = p.w.stride[forward ? 1 : 0];
  a.weight_h = p.w.stride[2], a.weight_w = p.w.stride[3];
  a.channels = static_cast<int32_t>(forward ? q.c_out : q.c_in);
  a.group_sources = static_cast<int32_t>(forward ? group_in : group_out);
  a.group_targets = static_cast<int32_t>(forward ? group_out : group_in);
  return nullptr;
}

bool suits(const ConfigInfo& config, const GatherArgs& a) {
  const bool source_last = a.source_stride[1] == 1, target_last = a.target_stride[1] == 1;
  if (config.paired) return source_last && target_last;
  if (config.sources > 1 && !source_last) return false;
  return config.targets == 1 ? a.group_targets == 1 || config.sources == 1 : a.group_targets > 1;
}

const char* plan_gather(const Shape& shape, const GatherArgs& args, GatherPlan& plan) {
  plan.args = args;
  GatherArgs& a = plan.args;
  const ConfigInfo& config = shape.config;
  if (config.paired && (a.group_sources != 1 || a.group_targets != 1))
    return "it needs one channel a group";
  if (!config.paired && config.sources > 1 && a.group_sources % config.sources != 0)
    return "it needs a multiple of four source channels a group";
  a.group_units =
      config.paired ? 1 : static_cast<int32_t>(ceil_div(a.group_targets, config.targets));
  a.units = static_cast<int32_t>(config.paired ? ceil_div(a.channels, config.targets)
                                               : int64_t(a.channels) /
                                                     std::max(a.group_targets, 1) * a.group_units);

  // The slots of a row of weights: phase by phase in a window, or the kernel as it is.
  std::fill(std::begin(a.slot_k), std::end(a.slot_k), int16_t(-1));
  a.slots = 1;
  for (int r = 0; r < a.columns.phases; ++r)
    for (int tap = a.columns.begin[r]; tap < a.columns.begin[r + 1]; ++tap) {
      const int k = a.columns.k[tap];
      const int slot = shape.window ? r * shape.window + a.columns.offset[tap] - shape.first : k;
      a.slot_k[slot] = static_cast<int16_t>(k);
      a.slots = std::max(a.slots, slot + 1);
    }
  a.slots = a.slots | 1;

  // Lanes: along channels where they are what is contiguous in the target, then columns, then rows.
  const bool across_channels = a.target_stride[1] == 1 && a.units > 1;
  a.unit_lanes = across_channels ? balanced(a.units, 32) : 1;
  const int64_t column_phases = shape.window ? 1 : a.columns.phases;
  const int64_t runs = ceil_div(a.columns.positions, shape.positions);
  a.column_lanes = static_cast<int32_t>(
      column_phases *
      balanced(runs, std::max<int64_t>(1, kThreads / a.unit_lanes / column_phases)));
  if (a.column_lanes > kThreads) return "it needs strides of at most 64";
  while (a.unit_lanes * a.column_lanes > kThreads) a.unit_lanes = (a.unit_lanes + 1) / 2;

  // As many phases of rows as fit the block and its shared memory.
  const int sum_bytes = shape.element_bytes == 8 ? 8 : 4;
  const int rows_of_lanes = kThreads / (a.unit_lanes * a.column_lanes);
  a.row_phases = std::min(a.rows.phases, rows_of_lanes);
  for (;; a.row_phases = (a.row_phases + 1) / 2) {
    a.most_row_taps = 0;
    for (int r = 0; r < a.rows.phases; r += a.row_phases)
      a.most_row_taps =
          std::max(a.most_row_taps,
                   a.rows.begin[std::min(r + a.row_phases, a.rows.phases)] - a.rows.begin[r]);
    const int64_t bytes = int64_t(config.paired ? 1 : a.group_sources) * a.most_row_taps *
                          a.unit_lanes * a.slots * config.targets * sum_bytes;
    plan.shared_bytes = static_cast<int>(std::min<int64_t>(bytes, kMostOffset));
    if (bytes <= kSharedBytes) break;
    if (a.row_phases > 1) continue;
    if (a.unit_lanes == 1 && bytes <= kMostSharedBytes) break;
    if (a.unit_lanes == 1) return "it needs the weights of a target row in 96 KiB";
    a.unit_lanes = (a.unit_lanes + 1) / 2;
  }
  a.row_phase_blocks = static_cast<int32_t>(ceil_div(a.rows.phases, a.row_phases));
  a.row_lanes = a.row_phases * balanced(a.rows.positions,
                                        kThreads / (a.unit_lanes * a.column_lanes * a.row_phases));
  a.unit_blocks = static_cast<int32_t>(ceil_div(a.units, a.unit_lanes));
  a.column_tiles = static_cast<int32_t>(ceil_div(runs, a.column_lanes / column_phases));
  const int64_t row_tiles = ceil_div(a.rows.positions, a.row_lanes / a.row_phases);
  const double others =
      static_cast<double>(plan.batch) * a.unit_blocks * a.row_phase_blocks * a.column_tiles;
  a.row_steps = static_cast<int32_t>(std::max(
      1.0,
      std::min({double(kMostRowSteps), double(row_tiles), others * row_tiles / kEnoughBlocks})));
  a.row_tiles = static_cast<int32_t>(ceil_div(row_tiles, a.row_steps));
  const double blocks = others * a.row_tiles;
  if (blocks > kMostBlocks) return "it needs a smaller batch";
  plan.blocks = static_cast<int>(blocks);
  plan.threads = a.unit_lanes * a.column_lanes * a.row_lanes;

  const int run = shape.positions * shape.step, outputs = shape.positions * shape.phases;
  a.vector_source =
      config.sources > 1
          ? aligned(a.source, a.source_stride, 1, config.sources, shape.element_bytes)
          : shape.window && aligned(a.source, a.source_stride, 3,
                                    vector_of(run, shape.element_bytes), shape.element_bytes);
  a.vector_target_row =
      shape.window && aligned(a.target, a.target_stride, 3, vector_of(outputs, shape.element_bytes),
                              shape.element_bytes);
  a.vector_target_channels =
      config.targets > 1 &&
      (config.paired || a.group_targets % config.targets == 0 || a.group_targets == a.channels) &&
      aligned(a.target, a.target_stride, 1, config.targets, shape.element_bytes);
  return nullptr;
}

}  // namespace direct
}  // namespace cuda
}  // namespace deconv
