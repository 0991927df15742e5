// One way to run independent tasks on threads. Results never depend on the number of threads: a
// task writes what no other writes, and sums over tasks are taken by the caller in a fixed order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cfenv>
#include <cstdint>
#include <exception>

namespace deconv {

// A thread of the team computes in its caller's floating-point environment,
// torch.set_flush_denormal above all, and takes its own back afterwards.
class BorrowedEnvironment {
 public:
  explicit BorrowedEnvironment(const std::fenv_t& callers) {
    std::fegetenv(&own_);
    std::fesetenv(&callers);
  }
  ~BorrowedEnvironment() { std::fesetenv(&own_); }
  BorrowedEnvironment(const BorrowedEnvironment&) = delete;
  BorrowedEnvironment& operator=(const BorrowedEnvironment&) = delete;

 private:
  std::fenv_t own_;
};

// Fewer elements than this are not worth waking a thread, if all that is done is to copy or add
// them.
constexpr int64_t kElementsForThreads = 4096;

// Neighbouring rows of a plane that a task computes: four tasks a thread, if there are rows enough.
inline int64_t rows_of_a_task(int64_t rows, int64_t planes, int threads) {
  const int64_t tasks = 4 * threads;
  return std::max<int64_t>(1, std::min(rows, (rows * planes + tasks - 1) / tasks));
}

// Calls task(i) for i in [0, tasks); dynamic, since tasks differ in cost and cores in speed. The
// first exception is rethrown.
template <class Task>
void parallel_for(int64_t tasks, int threads, const Task& task) {
  const int team = static_cast<int>(std::min<int64_t>(tasks, threads));
  if (team <= 1) {
    for (int64_t i = 0; i < tasks; ++i) task(i);
    return;
  }
  std::exception_ptr error;
  std::fenv_t environment;
  std::fegetenv(&environment);
#pragma omp parallel num_threads(team)
  {
    const BorrowedEnvironment borrowed(environment);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) {
      try {
        task(i);
      } catch (...) {
#pragma omp critical(deconv_parallel_for_error)
        error = std::current_exception();
      }
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace deconv
