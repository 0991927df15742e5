// The model of the gather product: one thread's cycles by layout and tile, and the choice of the
// best. The plan that is made of the choice is in gather.cpp.
#include <limits>

#include "../choices.h"
#include "gather_planning.h"

namespace deconv {
namespace cpu {
namespace {

// At how many positions of an axis all offsets from `lowest` to `highest` read inside the source.
int64_t positions_inside(const AxisTaps& axis, int64_t lowest, int64_t highest) {
  const int64_t first = std::max<int64_t>(0, ceil_div(-lowest, axis.source_step));
  const int64_t last =
      std::min(axis.positions - 1, floor_div(axis.source - 1 - highest, axis.source_step));
  return std::max<int64_t>(0, last - first + 1);
}

// Channels of a flat image packed at a time are at least so many.
constexpr int64_t kFewestChannels = 8;
// Flat pixels: a vector that crosses cache lines is loaded twice, and channels lie strewn.
constexpr double kUnaligned = 1.18;
// Where a group's channels are a part of each pixel, lines that are read in place lie strewn too,
// and share few sets of the L1 cache.
constexpr double kSlices = 1.12;

// The taps of a pixel in a row of the source, where they are copied as one run.
constexpr double kTapRow = 16;

// The part of a product's time that it waits for the lines of a target that it does not write
// itself, but after a block.
constexpr double kWaiting = 0.1;

// The part of the tiles that cannot be read where they are, where rows are lanes: those at the ends
// of rows, and any of which a tap would read outside.
double packed_fraction(const GatherPlan& plan, int64_t pixel_width) {
  if (!plan.source_as_is || plan.offsets() == 0) return 1;
  const int64_t h = positions_inside(plan.h, plan.offsets_h.front(), plan.offsets_h.back()),
                w = positions_inside(plan.w, plan.offsets_w.front(), plan.offsets_w.back());
  return 1 - static_cast<double>(h * (w / pixel_width * pixel_width)) /
                 static_cast<double>(std::max<int64_t>(1, plan.h.positions * plan.w.positions));
}

}  // namespace

double valid_fraction(const AxisTaps& axis) {
  int64_t listed = 0, valid = 0;
  for (const PhaseClass& c : axis.classes)
    for (int64_t offset : c.offsets) {
      valid += positions_inside(axis, offset, offset);
      listed += axis.positions;
    }
  return listed ? static_cast<double>(valid) / static_cast<double>(listed) : 1.0;
}

Flat flat_images(const GatherPlan& plan, bool rows_across, int64_t element_bytes) {
  const int64_t halo_h = GatherPlan::halo(plan.offsets_h, plan.h.source_step),
                halo_w = GatherPlan::halo(plan.offsets_w, plan.w.source_step);
  const int64_t shift = halo_h * (plan.w.positions + halo_w) + halo_w;
  // Each residue must be some tap's, and some of them two taps'. Without that, too, a row is one
  // copy where rows are lanes, which is worth it if no channel has to wait for the next block.
  const bool shared =
      plan.offsets() > plan.residues() ||
      (rows_across && plan.offsets() == plan.residues() && plan.channels <= kLeastChannels);
  const bool covered = static_cast<int64_t>(plan.offsets_w.size()) >= plan.w.source_step && shared;
  // What lies otherwise in memory is transposed. What takes several elements at a time (AMX) knows
  // of flat lanes that lie in rows alone.
  const bool in_rows = plan.source.stride[3] == 1, together = plan.source.stride[1] == 1;
  const bool packable = rows_across ? plan.channel_unit == 1 && (in_rows || together)
                                    : in_rows || (together && plan.channel_unit == 1);
  if (plan.offsets() == 0 || !covered || !packable || plan.h.positions == 0 ||
      plan.w.positions == 0)
    return {};
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

Layout best_layout(const GatherPlan& plan, const TileShape* tiles, int tile_count, int lanes,
                   int64_t element_bytes, int64_t images, std::optional<bool> by_channel) {
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
  // With one channel at a time, the taps in a row of the source are one copy. (Where much of a tile
  // is padding, its pixels may be those of several images.)
  const bool tap_runs = plan.channel_unit == 1 && plan.source.stride[3] == 1 &&
                        plan.source.stride[1] != 1 && plan.offsets() > 0 &&
                        plan.offsets_w.back() - plan.offsets_w.front() <
                            static_cast<int64_t>(plan.offsets_w.size()) &&
                        valid_fraction(plan.h) * valid_fraction(plan.w) >= kFewPadding;
  Layout best{false, by_phase, false, false, false, 0, std::numeric_limits<double>::max()};
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
      bool flat = false, channelwise = false, in_turns = false;
      if (rows_across) {
        const double crossing = packed_fraction(plan, pixel_width);
        const double element = plan.source.stride[1] <= 16                       ? kElement
                               : plan.w.source_step * plan.source.stride[3] < 16 ? kFarElement
                                                                                 : kLoneElement;
        pack = offsets * (plan.source.stride[1] == 1
                              ? crossing * (kRun + channels * kVectorCopied / lanes)
                              : channels * element);
        // Whole tiles of rows are written where the result lies.
        const bool in_place = (plan.target_as_is || plan.rounds) && by_phase &&
                              plan.target.stride[1] == 1 && plan.rows % row_width == 0 &&
                              plan.params.activation == Activation::kNone;
        store = outputs * (in_place ? kVectorStored / lanes
                           : plan.target.stride[by_phase ? 1 : 3] == 1
                               ? kRun / contiguous + kVectorStored / lanes
                           : by_phase && plan.target.stride[3] == 1 ? kTransposed
                                                                    : stored_element);
        const double multiplied = multiply, stored = store;  // without flat images
        if (flat_rows.possible) {
          const double once =
              channels * flat_rows.waste * flat_rows.copies * static_cast<double>(plan.residues()) *
                  (plan.source.stride[1] == 1 ? kVectorCopied / lanes : kTransposed) +
              static_cast<double>(plan.count_residues_h()) * kRow /
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
        if (tap_runs) {
          // The sums of each channel are added to those of the ones before.
          const double by_row = channels * (static_cast<double>(plan.offsets_h.size()) * kTapRow +
                                            offsets * kVectorCopied / lanes +
                                            outputs * (kVectorCopied + kVectorStored) / lanes);
          channelwise = by_channel.value_or(multiplied + stored + by_row < multiply + store + pack);
          if (channelwise) {
            flat = false;
            multiply = multiplied;
            store = stored;
            pack = by_row;
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
        in_turns = !by_phase && takes_turns(plan, row_width);
        // With a step, planes whose rows hold a tile are better off: most of their tiles are
        // written where the result lies, and a tap begins anew less often.
        const bool wide = plan.source.stride[3] == 1 && plan.w.positions >= pixel_width;
        if (flat_lanes.possible && (plan.residues() == 1 || !wide)) {
          const double once = channels * flat_lanes.waste * flat_lanes.copies *
                              static_cast<double>(plan.count_residues_h()) *
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
      double cycles = positions * (multiply + pack + store);
      if (in_turns) cycles *= 1 - kWaiting;
      if (by_channel && channelwise != *by_channel) continue;
      if (cycles < best.cycles)
        best = {rows_across, by_phase, flat, channelwise, in_turns, t, cycles};
    }
  return best;
}

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
      // Weights of merged phases are packed one by one, which a few percent do not pay for, unless
      // phases lie together there as in the target.
      if (option == 0 || layout.cycles < (layout.in_turns ? 1.0 : 0.95) * best.layout.cycles)
        best = {h, w, layout};
    }
    return best;
  };
  static Remembered<Choice> answers;
  Call call = describe(op, params, -1, 0, false);
  call.insert(call.end(), {format.lanes, format.element_bytes, static_cast<int64_t>(format.pairs)});
  // Pairs of channels need not be aligned.
  for (const TensorRef* t : {&params.x, &params.w, &params.y})
    call.push_back(reinterpret_cast<intptr_t>(t->data) % (2 * format.stored_bytes));
  return answers(call, find);
}

}  // namespace cpu
}  // namespace deconv
