#include "profile.h"

#include <cstdio>

#include "../log.h"

namespace deconv {
namespace cpu {
namespace {

constexpr const char* kNames[kPhases] = {"weights", "pack", "product", "store"};

}  // namespace

std::atomic<bool> profiling{false};
std::atomic<int64_t> phase_nanoseconds[kPhases];

CallProfile::CallProfile(const char* op, const char* algorithm, int threads)
    : op_(op), algorithm_(algorithm), threads_(threads), asked_(asked_to_log("profile")) {
  if (!asked_) return;
  for (auto& phase : phase_nanoseconds) phase = 0;
  profiling = true;
  start_ = std::chrono::steady_clock::now();
}

CallProfile::~CallProfile() {
  if (!asked_) return;
  profiling = false;
  const double us =
      std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start_).count();
  std::string line;
  double left = 100;
  for (int i = 0; i < kPhases; ++i) {
    const double percent =
        static_cast<double>(phase_nanoseconds[i]) / 10 / (us * threads_);  // of the threads' time
    char text[48];
    std::snprintf(text, sizeof text, ", %s %.1f %%", kNames[i], percent);
    line += text;
    left -= percent;
  }
  std::fprintf(stderr, "deconv_ext: %s %s %.0f us on %d threads%s, waiting %.1f %%\n", op_,
               algorithm_, us, threads_, line.c_str(), left);
}

}  // namespace cpu
}  // namespace deconv
