#include "winograd_taps.h"

namespace deconv {
namespace cpu {
namespace {

// A term of a sum before values have numbers.
struct Term {
  WinogradValue value;
  WinogradWeight weight;
};

// The sums of a phase, in the order of WinogradPhase.
using Sums = std::array<std::vector<Term>, 4>;

WinogradValue alone(int64_t d) { return {d, d, 0}; }

// Adds `count` taps that follow each other, their sources `step` apart from `offset` on.
void add_taps(Sums& sums, int64_t offset, int64_t step, int64_t count, const int64_t* g) {
  const auto d = [&](int64_t i) { return offset + i * step; };
  auto& [first, last, sum, difference] = sums;
  if (count == 1) {
    first.push_back({alone(d(0)), {1, {g[0]}, {1}}});
    last.push_back({alone(d(1)), {1, {g[0]}, {1}}});
  } else if (count == 2) {
    first.push_back({{d(0), d(1), -1}, {1, {g[0]}, {1}}});
    sum.push_back({alone(d(1)), {2, {g[0], g[1]}, {1, 1}}});
    last.push_back({{d(1), d(2), -1}, {1, {g[1]}, {-1}}});
  } else {
    first.push_back({{d(0), d(2), -1}, {1, {g[0]}, {1}}});
    sum.push_back({{d(1), d(2), 1}, {3, {g[0], g[1], g[2]}, {0.5f, 0.5f, 0.5f}}});
    difference.push_back({{d(1), d(2), -1}, {3, {g[0], g[1], g[2]}, {-0.5f, 0.5f, -0.5f}}});
    last.push_back({{d(1), d(3), -1}, {1, {g[2]}, {-1}}});
  }
}

Sums sums_of(const PhaseClass& phase, int64_t step) {
  Sums sums;
  std::vector<bool> taken(phase.offsets.size());
  for (size_t tap = 0; tap < phase.offsets.size(); ++tap) {
    if (taken[tap]) continue;
    // The taps that follow each other from here on.
    std::vector<int64_t> g;
    for (size_t next = tap; next < phase.offsets.size(); ++next)
      if (phase.offsets[next] == phase.offsets[tap] + static_cast<int64_t>(g.size()) * step) {
        g.push_back(phase.k[next]);
        taken[next] = true;
      }
    // By threes, and what is left by twos.
    const auto count = static_cast<int64_t>(g.size());
    for (int64_t at = 0, length; at < count; at += length) {
      const int64_t left = count - at;
      length = left == 2 || left == 4 ? 2 : std::min<int64_t>(left, 3);
      add_taps(sums, phase.offsets[tap] + at * step, step, length, g.data() + at);
    }
  }
  return sums;
}

}  // namespace

WinogradAxis winograd_axis(const AxisTaps& direct, size_t first_class, size_t classes) {
  WinogradAxis axis{};
  AxisTaps& taps = axis.taps;
  taps = {direct.source,
          direct.target,
          2 * direct.source_step,
          2 * direct.target_step,
          ceil_div(direct.positions, 2),
          {}};
  std::vector<Sums> all;
  for (size_t i = 0; i < classes; ++i) {
    all.push_back(sums_of(direct.classes[first_class + i], direct.source_step));
    for (const auto& sum : all.back())
      for (const Term& term : sum) axis.values.push_back(term.value);
  }
  std::sort(axis.values.begin(), axis.values.end());
  const auto same = [](const WinogradValue& a, const WinogradValue& b) {
    return !(a < b) && !(b < a);
  };
  axis.values.erase(std::unique(axis.values.begin(), axis.values.end(), same), axis.values.end());

  const auto add_class = [&](int64_t first_phase, std::vector<Term> terms) {
    std::sort(terms.begin(), terms.end(),
              [](const Term& a, const Term& b) { return a.value < b.value; });
    PhaseClass c{first_phase, 1, {}, {}};
    for (const Term& term : terms) {
      c.offsets.push_back(std::lower_bound(axis.values.begin(), axis.values.end(), term.value) -
                          axis.values.begin());
      c.k.push_back(static_cast<int64_t>(axis.weights.size()));
      axis.weights.push_back(term.weight);
    }
    taps.classes.push_back(c);
    return static_cast<int64_t>(taps.classes.size()) - 1;
  };
  axis.phases.assign(classes, {-1, -1, -1, -1});
  for (size_t i = 0; i < classes; ++i)
    axis.phases[i].first = add_class(direct.classes[first_class + i].first_phase, all[i][0]);
  for (size_t i = 0; i < classes; ++i)
    axis.phases[i].last =
        add_class(direct.classes[first_class + i].first_phase + direct.target_step, all[i][1]);
  axis.targets = static_cast<int64_t>(taps.classes.size());
  for (size_t i = 0; i < classes; ++i) {
    if (!all[i][2].empty()) axis.phases[i].sum = add_class(0, all[i][2]);
    if (!all[i][3].empty()) axis.phases[i].difference = add_class(0, all[i][3]);
    axis.shares |= axis.phases[i].sum >= 0;
    const PhaseClass& phase = direct.classes[first_class + i];
    axis.kernel.insert(axis.kernel.end(), phase.k.begin(), phase.k.end());
  }
  return axis;
}

}  // namespace cpu
}  // namespace deconv
