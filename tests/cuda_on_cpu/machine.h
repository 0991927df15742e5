// The state of the emulated machine; shared by threads.cpp (fibers, barriers), checks.cpp (memory),
// counters.cpp (sectors and bank conflicts), instructions.cpp (what a warp does together) and
// asynchronous.cpp (what goes on beside the threads).
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

enum class State { kReady, kAtBarrier, kAtCollective, kAtMbarrier, kDone };

// One instruction of a warp or a warpgroup: `execute` gets all lanes' operands.
using Execute = void (*)(void* const* operands);

struct Copy {
  unsigned char* to;
  unsigned char data[16];
  int bytes;
};

// Sums of a product that may not be touched yet.
struct PendingSums {
  float* registers;  // where the thread keeps them
  int group;         // of products, by number
  std::vector<float> values;
};

struct Thread {
  void* stack_pointer;
  char* stack;
  unsigned index[3];  // threadIdx
  State state;
  Site site;                              // of the barrier or collective it waits at
  int line;                               // of the barrier
  Execute execute;                        // of the collective
  void* operands;                         // of this lane
  std::vector<std::vector<Copy>> groups;  // copies in flight by commit group, oldest first
  std::vector<Copy> uncommitted;
  bool sums_fenced;    // wgmma.fence since registers were last the thread's own
  int product_groups;  // committed so far
  std::vector<PendingSums> sums;
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

// Waits until all lanes of the warp (or of `lanes` threads) are here, then one of them executes for
// all.
void collective(Site site, Execute execute, void* operands, int lanes = kWarp);

// Leaves the thread until somebody makes it ready.
void yield();

// ---- checks.cpp ---------------------------------------------------------------------------------

enum class Access { kRead, kWrite };

// `aligned` to: the size of the access, or 1 where the compiler knows it may be less.
void check(int thread, Site site, const void* address, size_t bytes, Access access, size_t aligned);
// Between issue and arrival of an asynchronous copy its destination belongs to nobody.
void check_copy_issued(int thread, Site site, void* to, size_t bytes);
void check_copy_arrived(int thread, Site site, void* to, size_t bytes);
void reset_shared();
size_t shared_offset(const void* address);
bool in_shared(const void* address, size_t bytes);
// The same of a copy by the copy engine that completes on mbarrier number `barrier`.
void check_bulk_issued(int thread, Site site, void* to, size_t bytes);
void check_bulk_arrived(void* to, size_t bytes, int barrier);
// 16 bytes that a product reads for some warps from `warp` on; `seen` and `fenced` as in `Clocks`,
// of all threads of the warpgroup.
void check_product_reads(int warp, int warps, Site site, const void* from, const uint32_t* seen,
                         const uint32_t* fenced);
void product_has_read(int warp, size_t at);
void start_reads();

// ---- asynchronous.cpp ---------------------------------------------------------------------------

// Who has seen what of whom, once a block uses mbarriers or the asynchronous proxy: until then
// barriers of the whole block are enough. Actors are the threads and, after them, the mbarriers,
// for which the copy engine writes. An actor's access at time t has been seen by thread u if u has
// heard of something that the actor did later, seen[u][actor] > t; and by the asynchronous proxy on
// behalf of u if there was a proxy fence on the way, fenced[u][actor] > t.
constexpr int kMaxMbarriers = 64;
struct Clocks {
  bool on = false;
  uint32_t time = 0;
  uint64_t changes = 0;  // of what anybody has seen
  size_t actors = 0;
  std::vector<uint32_t> seen, fenced;  // [thread][actor]
  uint32_t* seen_by(int thread) { return &seen[static_cast<size_t>(thread) * actors]; }
  uint32_t* fenced_by(int thread) { return &fenced[static_cast<size_t>(thread) * actors]; }
};
extern Clocks clocks;

// Threads [first, first + count) have met.
void meet(int first, int count);
void reset_asynchronous();
// Lets some copies arrive, as the seed has it; with `one`, one for certain. Whether any did.
bool copies_arrive(bool one);
// What the thread waits for, in words.
std::string awaited(int thread);
void check_nothing_flies();
uint64_t random_number();

// ---- counters.cpp -------------------------------------------------------------------------------

void count_access(int thread, Site site, const void* address, size_t bytes, Access access,
                  const char* tensor);  // tensor null: shared memory
void finish_block_counts();
void finish_launch_counts();

}  // namespace emulation
