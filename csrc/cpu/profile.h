// DECONV_EXT_LOG=profile: where the time of each call goes. The phases of all threads are added up;
// calls that run at the same time are mixed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>

namespace deconv {
namespace cpu {

enum class Phase { kWeights, kPack, kProduct, kStore };
constexpr int kPhases = 4;

extern std::atomic<bool> profiling;
extern std::atomic<int64_t> phase_nanoseconds[kPhases];

// Calls work() and adds its time to the phase. One call in the text: kernels are inlined here.
template <class Work>
inline void in_phase(Phase phase, const Work& work) {
  const bool profiled = profiling.load(std::memory_order_relaxed);
  std::chrono::steady_clock::time_point start;
  if (profiled) start = std::chrono::steady_clock::now();
  work();
  if (!profiled) return;
  phase_nanoseconds[static_cast<int>(phase)] +=
      std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
}

// Profiles what happens until the end of its life if it is asked to, and then prints one line.
class CallProfile {
 public:
  CallProfile(const char* op, const char* algorithm, int threads);
  ~CallProfile();
  CallProfile(const CallProfile&) = delete;
  CallProfile& operator=(const CallProfile&) = delete;

 private:
  const char *op_, *algorithm_;
  const int threads_;
  const bool asked_;
  std::chrono::steady_clock::time_point start_;
};

}  // namespace cpu
}  // namespace deconv
