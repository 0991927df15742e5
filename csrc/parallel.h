// One way to run independent tasks on threads. Results never depend on the number of threads: a
// task writes what no other writes, and sums over tasks are taken by the caller in a fixed order.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <exception>

namespace deconv {

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
#pragma omp parallel for num_threads(team) schedule(dynamic, 1)
  for (int64_t i = 0; i < tasks; ++i) {
    try {
      task(i);
    } catch (...) {
#pragma omp critical(deconv_parallel_for_error)
      error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace deconv
