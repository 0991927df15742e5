// Fibers, the order they run in, and where they wait for each other.
#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>

#include "cuda_runtime_api.h"
#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// The kernels' built-in variables, const for them alone.
struct Index {
  unsigned x, y, z;
};
extern "C" {
extern Index emulated_thread __asm__("threadIdx");
extern Index emulated_block __asm__("blockIdx");
extern Index emulated_block_size __asm__("blockDim");
extern Index emulated_grid __asm__("gridDim");
}
Index emulated_thread, emulated_block, emulated_block_size, emulated_grid;

// Saves the registers that a call preserves on this stack, leaves it for the other.
extern "C" void switch_stack(void** save, void* to);
#if defined(__x86_64__)
__asm__(R"(
.text
.globl switch_stack
.hidden switch_stack
.type switch_stack, @function
switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_stack, .-switch_stack
)");
#else
#error "switch_stack is written for x86-64"
#endif

namespace emulation {

Machine machine;

namespace {

std::mt19937_64 random_order;
std::string failure, planned;
void* host_stack_pointer;

struct Body {
  void (*run)(const void* kernel, const void* argument);
  const void* kernel;
  const void* argument;
} body;

#if defined(__SANITIZE_ADDRESS__)
const void* host_stack;
size_t host_stack_bytes;
void leave(const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(nullptr, stack, bytes);
}
void arrive_on_host() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }
void arrive_on_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
}
// A thread leaves without returning: its frames are still marked.
void forget_frames(char* stack) { __asan_unpoison_memory_region(stack, kStackBytes); }
#else
constexpr const void* host_stack = nullptr;
constexpr size_t host_stack_bytes = 0;
void leave(const void*, size_t) {}
void arrive_on_host() {}
void arrive_on_thread() {}
void forget_frames(char*) {}
#endif

// Stacks are kept between launches; memory is taken as they are used.
char* stack_of(size_t thread) {
  static std::vector<char*> stacks;
  while (stacks.size() <= thread) {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulation: no memory for stacks");
    stacks.push_back(static_cast<char*>(memory));
  }
  return stacks[thread];
}

Thread& current() { return machine.threads[static_cast<size_t>(machine.thread)]; }

void enter() {
  arrive_on_thread();
  body.run(body.kernel, body.argument);
  Thread& thread = current();
  if (!thread.groups.empty() || !thread.uncommitted.empty())
    fail(machine.thread, thread.site, "ends with asynchronous copies in flight");
  if (!thread.sums.empty()) fail(machine.thread, thread.site, "ends with products in flight");
  thread.state = State::kDone;
  yield();
  __builtin_unreachable();
}

void start(Thread& thread, size_t index) {
  thread = Thread{};
  thread.stack = stack_of(index);
  forget_frames(thread.stack);
  thread.state = State::kReady;
  const unsigned i = static_cast<unsigned>(index), x = emulated_block_size.x,
                 y = emulated_block_size.y;
  thread.index[0] = i % x, thread.index[1] = i / x % y, thread.index[2] = i / x / y;
  void** top = reinterpret_cast<void**>(thread.stack + kStackBytes);
  *--top = nullptr;  // the return address of enter(), which does not return
  *--top = reinterpret_cast<void*>(enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread.stack_pointer = top;
}

void resume(int index) {
  Thread& thread = machine.threads[static_cast<size_t>(index)];
  emulated_thread = {thread.index[0], thread.index[1], thread.index[2]};
  machine.thread = index;
  machine.on_thread = true;
  machine.stack = thread.stack;
  leave(thread.stack, kStackBytes);
  switch_stack(&host_stack_pointer, thread.stack_pointer);
  arrive_on_host();
  machine.on_thread = false;
  if (!failure.empty()) throw std::runtime_error(failure);
}

std::vector<int> shuffled(size_t count) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random_order);
  return order;
}

// Runs a warp for as long as any of its lanes can.
void run_warp(int warp) {
  const int first = warp * kWarp;
  const int lanes = std::min<int>(kWarp, static_cast<int>(machine.threads.size()) - first);
  for (bool progress = true; progress;) {
    progress = false;
    for (int lane : shuffled(static_cast<size_t>(lanes)))
      if (machine.threads[static_cast<size_t>(first + lane)].state == State::kReady) {
        resume(first + lane);
        progress = true;
      }
  }
}

bool any_ready() {
  return std::any_of(machine.threads.begin(), machine.threads.end(),
                     [](const Thread& t) { return t.state == State::kReady; });
}

void run_block() {
  reset_shared();
  reset_asynchronous();
  machine.epoch = 0;
  const size_t count = machine.threads.size(), warps = (count + kWarp - 1) / kWarp;
  machine.warp_epoch.assign(warps, 0);
  for (size_t i = 0; i < count; ++i) start(machine.threads[i], i);
  for (;;) {
    for (int warp : shuffled(warps)) {
      run_warp(warp);
      copies_arrive(false);
    }
    if (any_ready()) continue;
    const auto waiting = [](State state) {
      return std::find_if(machine.threads.begin(), machine.threads.end(),
                          [&](const Thread& t) { return t.state == state; });
    };
    const auto index = [](auto found) { return static_cast<int>(found - machine.threads.begin()); };
    const auto collective = waiting(State::kAtCollective), barrier = waiting(State::kAtBarrier),
               mbarrier = waiting(State::kAtMbarrier), none = machine.threads.end();
    if (mbarrier != none && copies_arrive(true)) continue;
    // fail() from the host throws.
    if (collective != none)
      fail(index(collective), collective->site,
           "waits at a collective that other lanes of its warp or warpgroup do not reach");
    if (mbarrier != none)
      fail(index(mbarrier), mbarrier->site, "deadlock: %s", awaited(index(mbarrier)).c_str());
    if (barrier == none) break;
    for (const Thread& other : machine.threads) {
      if (other.state == State::kDone)
        fail(index(barrier), barrier->site, "waits at a barrier, but other threads have ended");
      if (other.line != barrier->line)
        fail(index(barrier), barrier->site,
             "waits at a barrier, but other threads wait at another one");
    }
    ++machine.epoch;
    meet(0, static_cast<int>(count));
    for (Thread& thread : machine.threads) thread.state = State::kReady;
  }
  check_nothing_flies();
  finish_block_counts();
}

}  // namespace

void yield() {
  Thread& thread = current();
  leave(host_stack, host_stack_bytes);
  switch_stack(&thread.stack_pointer, host_stack_pointer);
  arrive_on_thread();
}

uint64_t random_number() { return random_order(); }

void seed(uint64_t value) {
  machine.seed = value;
  random_order.seed(value);
}

void plan(bool enabled) {
  machine.planning = enabled;
  planned.clear();
}

std::string planned_launches() { return "[" + planned + "]"; }

void fail(int thread, Site site, const char* format, ...) {
  char what[512], where[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(what, sizeof(what), format, arguments);
  va_end(arguments);
  std::snprintf(where, sizeof(where), "%s: block %lld, thread %d: ", machine.kernel,
                static_cast<long long>(machine.block), thread);
  char end[64];
  std::snprintf(end, sizeof(end), " [at %p, seed %llu]", site,
                static_cast<unsigned long long>(machine.seed));
  failure = std::string(where) + what + end;
  if (!machine.on_thread) throw std::runtime_error(failure);
  yield();
  __builtin_unreachable();
}

void launch_erased(void (*run)(const void*, const void*), const void* kernel, const void* argument,
                   const dim3& grid, const dim3& block, size_t shared_bytes, const char* name) {
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const size_t threads = size_t{block.x} * block.y * block.z;
  int limit = 0;
  attribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (threads == 0 || threads > 1024 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu ||
      shared_bytes > static_cast<size_t>(limit))
    throw std::runtime_error(
        std::string(name) + ": invalid launch: grid " + std::to_string(grid.x) + " x " +
        std::to_string(grid.y) + " x " + std::to_string(grid.z) + ", " + std::to_string(threads) +
        " threads, " + std::to_string(shared_bytes) + " bytes of shared memory");
  if (machine.planning) {
    char text[256];
    std::snprintf(text, sizeof(text),
                  "{\"kernel\": \"%s\", \"address\": \"%p\", \"blocks\": %lld, \"threads\": %zu, "
                  "\"shared\": %zu}",
                  name, kernel, static_cast<long long>(blocks), threads, shared_bytes);
    planned += (planned.empty() ? "" : ", ") + std::string(text);
    return;
  }
  body = {run, kernel, argument};
  machine.kernel = name;
  ++machine.launch;
  machine.shared_bytes = shared_bytes;
  machine.threads.resize(threads);
  emulated_block_size = {block.x, block.y, block.z};
  emulated_grid = {grid.x, grid.y, grid.z};
  failure.clear();
  for (int linear : shuffled(static_cast<size_t>(blocks))) {
    const unsigned i = static_cast<unsigned>(linear);
    machine.block = linear;
    emulated_block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
    run_block();
  }
  finish_launch_counts();
}

void copy_argument(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }

void sync_block(int line) {
  Thread& thread = current();
  thread.line = line;
  thread.state = State::kAtBarrier;
  thread.site = __builtin_return_address(0);
  yield();
}

void collective(Site site, Execute execute, void* operands, int lanes) {
  Thread& thread = current();
  thread.state = State::kAtCollective;
  thread.site = site;
  thread.execute = execute;
  thread.operands = operands;
  const size_t count = static_cast<size_t>(lanes),
               first = static_cast<size_t>(machine.thread) / count * count;
  if (first + count > machine.threads.size())
    fail(machine.thread, site, "needs a whole warp or warpgroup, and its block ends within it");
  void* all[4 * kWarp];
  for (size_t lane = 0; lane < count; ++lane) {
    const Thread& other = machine.threads[first + lane];
    if (other.state != State::kAtCollective) return yield();
    if (other.execute != execute)
      fail(machine.thread, site, "waits at a collective, but lane %zu waits at another one", lane);
    all[lane] = other.operands;
  }
  execute(all);
  for (size_t lane = 0; lane < count; ++lane) machine.threads[first + lane].state = State::kReady;
}

}  // namespace emulation
