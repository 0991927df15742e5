// The index equations of a transposed convolution, in the one place that spells them.
//
// Per axis, with input index i, kernel index k and output index o:
//
//     o = i * stride + k * dilation - pad                  (scatter form: the definition)
//     i = (o + pad - k * dilation) / stride, if exact      (gather form: what the kernels use)
//
// Outputs with the same r = o mod stride form a *phase*: o = j * stride + r. Which k reach a phase
// does not depend on j, and the input they read is i = j + offset with offset = (r + pad - k *
// dilation) / stride. So a phase is an ordinary stride-1 convolution, and its list of (k, offset)
// is all that a kernel has to know. With g = gcd(stride, dilation) a phase has taps only if g
// divides r + pad; the other phases receive the bias alone.
//
// Coordinates: i input, o output, k kernel, j position (pixel of a phase), r phase.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#define DECONV_HOST_DEVICE __host__ __device__
#else
#define DECONV_HOST_DEVICE
#endif

namespace deconv {

// One spatial axis of a problem. `pad` is cropped at the start; what is cropped at the end is
// implied by `out`.
struct Axis {
  int64_t in, out, kernel, stride, dilation, pad;
};

// y [batch, c_out, h.out, w.out] = deconv(x [batch, c_in, h.in, w.in], w [c_in, c_out / groups,
// h.kernel, w.kernel])
struct Problem {
  int64_t batch, c_in, c_out, groups;
  Axis h, w;
};

// Number of outputs along an axis; may be negative for impossible arguments.
inline int64_t output_size(int64_t in, int64_t kernel, int64_t stride, int64_t dilation,
                           int64_t pad_begin, int64_t pad_end, int64_t output_padding) {
  return (in - 1) * stride - pad_begin - pad_end + dilation * (kernel - 1) + output_padding + 1;
}

// The input that kernel element k carries to output o, or -1 if there is none.
DECONV_HOST_DEVICE inline int64_t input_index(const Axis& axis, int64_t o, int64_t k) {
  const int64_t scaled = o + axis.pad - k * axis.dilation;
  if (scaled < 0 || scaled % axis.stride != 0) return -1;
  const int64_t i = scaled / axis.stride;
  return i < axis.in ? i : -1;
}

// The output that kernel element k carries input i to, or -1 if it is cropped.
DECONV_HOST_DEVICE inline int64_t output_index(const Axis& axis, int64_t i, int64_t k) {
  const int64_t o = i * axis.stride + k * axis.dilation - axis.pad;
  return o >= 0 && o < axis.out ? o : -1;
}

inline int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }

// One term of a gather: source index = j * source step + offset, weighted by kernel element k.
struct Tap {
  int64_t k, offset;
};

// The taps of the outputs o = j * stride + phase; any integer `phase` will do, also a negative one.
// Taps that read outside the input for every j are left out.
inline std::vector<Tap> phase_taps(const Axis& axis, int64_t phase) {
  std::vector<Tap> taps;
  const int64_t first_j = ceil_div(-phase, axis.stride);
  const int64_t last_j = floor_div(axis.out - 1 - phase, axis.stride);
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t scaled = phase + axis.pad - k * axis.dilation;
    const int64_t offset = floor_div(scaled, axis.stride);
    if (offset * axis.stride != scaled) continue;
    if (first_j + offset < axis.in && last_j + offset >= 0) taps.push_back({k, offset});
  }
  return taps;
}

// A tap with the phase it belongs to.
struct PhaseTap {
  int64_t phase, k, offset;
};

// The taps of all phases of `forward` in one list, by ascending phase: never more than the kernel
// has elements, however large the stride.
inline std::vector<PhaseTap> forward_tap_list(const Axis& axis) {
  std::vector<PhaseTap> taps;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t shift = k * axis.dilation - axis.pad;
    const int64_t offset = -floor_div(shift, axis.stride);
    const int64_t phase = shift + offset * axis.stride;
    if (phase < axis.out && offset < axis.in && (axis.out - 1 - phase) / axis.stride + offset >= 0)
      taps.push_back({phase, k, offset});
  }
  std::stable_sort(taps.begin(), taps.end(),
                   [](const PhaseTap& a, const PhaseTap& b) { return a.phase < b.phase; });
  return taps;
}

// The taps of `grad_input`, which has one phase: source index = i * stride + offset.
inline std::vector<Tap> grad_input_tap_list(const Axis& axis) {
  std::vector<Tap> taps;
  for (int64_t k = 0; k < axis.kernel; ++k) {
    const int64_t offset = k * axis.dilation - axis.pad;
    if (offset < axis.out && (axis.in - 1) * axis.stride + offset >= 0) taps.push_back({k, offset});
  }
  return taps;
}

// ---------------------------------------------------------------------------------------------------------------------------
// Tap tables. `forward` and `grad_input` are the same gather with different tables:
//
//     target[j * target_step + r] = sum over the taps of phase r of source[j * source_step +
//     offset] * weight[k]
//
//     forward:     source x,  target y,  source_step 1,       target_step stride,  one table a
//     phase grad_input:  source dy, target dx, source_step stride,  target_step 1,       one phase
//     with every k, offset k*dilation-pad

// Neighbouring phases that share one list of source offsets. A phase that lacks the tap of an
// offset has k = -1 there: a zero in the packed weights.
struct PhaseClass {
  int64_t first_phase;           // r of the first phase; negative where the coordinates are shifted
  int64_t phases;                // how many
  std::vector<int64_t> offsets;  // source offsets, ascending
  std::vector<int64_t> k;        // [phases][offsets.size()]
};

struct AxisTaps {
  int64_t source, target, source_step, target_step;
  int64_t positions;  // j runs over [0, positions); targets outside [0, target) are not stored
  std::vector<PhaseClass> classes;  // together they hold every phase once, in ascending order
};

inline PhaseClass make_phase_class(int64_t first_phase,
                                   const std::vector<std::vector<Tap>>& phases) {
  PhaseClass c{first_phase, static_cast<int64_t>(phases.size()), {}, {}};
  for (const auto& taps : phases)
    for (const Tap& tap : taps) c.offsets.push_back(tap.offset);
  std::sort(c.offsets.begin(), c.offsets.end());
  c.offsets.erase(std::unique(c.offsets.begin(), c.offsets.end()), c.offsets.end());
  const size_t width = c.offsets.size();
  c.k.assign(phases.size() * width, -1);
  for (size_t phase = 0; phase < phases.size(); ++phase)
    for (const Tap& tap : phases[phase]) {
      const auto at =
          std::lower_bound(c.offsets.begin(), c.offsets.end(), tap.offset) - c.offsets.begin();
      c.k[phase * width + static_cast<size_t>(at)] = tap.k;
    }
  return c;
}

// forward. `merged` puts all phases into one class, in coordinates shifted by pad mod stride, where
// without dilation they share ceil(kernel / stride) offsets; otherwise every phase is a class of
// its own with exactly its taps.
inline AxisTaps forward_taps(const Axis& axis, bool merged) {
  AxisTaps table{axis.in, axis.out, 1, axis.stride, 0, {}};
  const int64_t shift = merged ? axis.pad % axis.stride : 0;
  const int64_t phases = merged ? axis.stride : std::min(axis.stride, axis.out);
  table.positions = ceil_div(axis.out + shift, axis.stride);
  std::vector<std::vector<Tap>> lists;
  for (int64_t r = 0; r < phases; ++r) lists.push_back(phase_taps(axis, r - shift));
  if (merged) {
    table.classes.push_back(make_phase_class(-shift, lists));
  } else {
    for (int64_t r = 0; r < phases; ++r)
      table.classes.push_back(make_phase_class(r, {lists[static_cast<size_t>(r)]}));
  }
  return table;
}

// grad_input: an ordinary convolution of dy with step `stride`.
inline AxisTaps grad_input_taps(const Axis& axis) {
  AxisTaps table{axis.out, axis.in, axis.stride, 1, axis.in, {}};
  table.classes.push_back(make_phase_class(0, {grad_input_tap_list(axis)}));
  return table;
}

}  // namespace deconv
