// What deconv_ext.autotune has found to be fastest, and which calls it has to look into:
// operators.cpp asks here before it leaves the choice of an algorithm to the device. Nothing is
// asked, and no time spent, until there is a choice or calls are recorded.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "params.h"

namespace deconv {

// All that a choice depends on: op, dtype, device (-1: the CPU), its threads (0: a GPU), whether
// TF32 is allowed; batch, c_in, c_out, groups; in, out, kernel, stride, dilation, pad of h, then of
// w; the strides of x, of w and of y.
using Call = std::vector<int64_t>;

inline Call describe(Op op, const Params& p, int64_t device, int64_t threads, bool allow_tf32) {
  const Problem& q = p.problem;
  Call call;
  call.reserve(40);
  call.assign(
      {static_cast<int64_t>(op), static_cast<int64_t>(p.dtype), device, threads, allow_tf32});
  call.insert(call.end(), {q.batch, q.c_in, q.c_out, q.groups});
  for (const Axis* a : {&q.h, &q.w})
    call.insert(call.end(), {a->in, a->out, a->kernel, a->stride, a->dilation, a->pad});
  for (const TensorRef* t : {&p.x, &p.w, &p.y})
    call.insert(call.end(), std::begin(t->stride), std::end(t->stride));
  return call;
}

class Choices {
 public:
  bool in_use() const { return in_use_.load(std::memory_order_relaxed); }

  void set(std::map<Call, std::string> algorithms) {
    const std::lock_guard<std::mutex> lock(mutex_);
    algorithms_ = std::move(algorithms);
    in_use_ = recording_ || !algorithms_.empty();
  }

  // From now on, or no longer; returns the calls since it began.
  std::vector<Call> record(bool enabled) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::vector<Call> calls(calls_.begin(), calls_.end());
    calls_.clear();
    recording_ = enabled;
    in_use_ = recording_ || !algorithms_.empty();
    return calls;
  }

  // The algorithm for the call: "auto" where none was chosen.
  std::string find(const Call& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (recording_) calls_.insert(call);
    const auto found = algorithms_.find(call);
    return found == algorithms_.end() ? "auto" : found->second;
  }

  // Whether there was one: of several threads, one forgets it.
  bool forget(const Call& call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return algorithms_.erase(call) != 0;
  }

 private:
  std::atomic<bool> in_use_{false};
  std::mutex mutex_;
  bool recording_ = false;
  std::map<Call, std::string> algorithms_;
  std::set<Call> calls_;
};

// Answers of a model that takes microseconds to ask: once for each kind of call.
template <class Answer>
class Remembered {
 public:
  template <class Find>
  Answer operator()(const Call& call, const Find& find) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = answers_.find(call);
    if (found != answers_.end()) return found->second;
    if (answers_.size() >= kMost) answers_.clear();
    return answers_[call] = find();
  }

 private:
  static constexpr std::size_t kMost = 4096;
  std::mutex mutex_;
  std::map<Call, Answer> answers_;
};

}  // namespace deconv
