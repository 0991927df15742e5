// The state of the emulated machine; shared by threads.cpp (fibers, barriers), checks.cpp (memory),
// counters.cpp (sectors and bank conflicts) and instructions.cpp (what a warp does together).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "emulation.h"

namespace emulation {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{1} << 18;

using Site = const void*;  // a return address: where in the kernel

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

// One warp instruction: `execute` gets the 32 lanes' operands.
using Execute = void (*)(void* const* operands);

struct Copy {
  unsigned char* to;
  unsigned char data[16];
  int bytes;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  State state;
  Site site;                              // of the barrier or collective it waits at
  int line;                               // of the barrier
  Execute execute;                        // of the collective
  void* operands;                         // of this lane
  std::vector<std::vector<Copy>> groups;  // copies in flight by commit group, oldest first
  std::vector<Copy> uncommitted;
};

struct Machine {
  const char* kernel = "";
  int launch = 0;
  int64_t block = 0;       // linear
  bool on_thread = false;  // else the host runs; false before any constructor has run, too
  int thread = 0;          // that runs
  char* stack = nullptr;   // of that thread
  uint32_t epoch = 0;      // barriers of this block so far
  std::vector<uint32_t> warp_epoch;  // __syncwarp()s of each warp in this block
  std::vector<Thread> threads;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  uint64_t seed = 0;
  bool counting = false;
  bool planning = false;  // launches are put down instead of run
};

extern Machine machine;

// Ends the launch with a message; does not return. `thread` is whom it is about.
[[noreturn]] void fail(int thread, Site site, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Waits until all 32 lanes are here, then one of them executes for all.
void collective(Site site, Execute execute, void* operands);

// ---- checks.cpp ---------------------------------------------------------------------------------

enum class Access { kRead, kWrite };

// `aligned` to: the size of the access, or 1 where the compiler knows it may be less.
void check(int thread, Site site, const void* address, size_t bytes, Access access, size_t aligned);
// Between issue and arrival of an asynchronous copy its destination belongs to nobody.
void check_copy_issued(int thread, Site site, void* to, size_t bytes);
void check_copy_arrived(int thread, Site site, void* to, size_t bytes);
void reset_shared();

// ---- counters.cpp -------------------------------------------------------------------------------

void count_access(int thread, Site site, const void* address, size_t bytes, Access access,
                  const char* tensor);  // tensor null: shared memory
void finish_block_counts();
void finish_launch_counts();

}  // namespace emulation
