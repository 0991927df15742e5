// Runs CUDA kernels on the CPU, to test them: one fiber a CUDA thread, blocks one after the other,
// blocks, warps and lanes in an order that a seed decides.
//
// Every access to memory is checked, the plain ones too: kernels are compiled with
// -fsanitize=thread, which calls a function before each access, and those functions are ours
// (checks.cpp) instead of the thread sanitizer's. An access has to lie in a registered tensor, in
// the block's shared memory or on the thread's own stack, be aligned to its size, and read what has
// been written. Two threads that touch one address, one of them writing, need a barrier in between;
// in global memory no other block may do so at all within a launch.
//
// Of Hopper's instructions (asynchronous.cpp) the order between threads that mbarriers make is kept
// as vector clocks; copies arrive as late and in as odd an order as the seed likes; products read
// shared memory through their descriptors, and their sums are NaN until they are waited for.
//
// A mistake ends the launch with std::runtime_error that says what, where and which thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

struct dim3;

namespace emulation {

// ---- what the host calls ------------------------------------------------------------------------

enum class Kind {
  kInput,      // read only
  kOutput,     // uninitialised until written
  kWorkspace,  // the same, but not part of the result
};

void seed(uint64_t value);
// Tensors the kernels may touch; `bytes` at `data` stay the caller's, who leaves a gap of 256 bytes
// on either side.
void add_tensor(void* data, size_t bytes, Kind kind, const char* name);
void remove_tensors();
void fill(void* data, int value, size_t bytes);
// Device attributes, for choosing a configuration.
bool attribute(int* value, int which);
void set_attribute(int which, int value);
// Whether to count sectors and bank conflicts (slower); the counts of all launches as JSON.
void count(bool enabled);
std::string counts();

// Whether launches are only put down, after the checks that the driver makes: operands may be any
// addresses then; the launches since as JSON.
void plan(bool enabled);
std::string planned_launches();

// Copies without being checked: the argument lies with the host.
void copy_argument(void* to, const void* from, size_t bytes);
// Calls run(kernel, argument) once a thread.
void launch_erased(void (*run)(const void* kernel, const void* argument), const void* kernel,
                   const void* argument, const dim3& grid, const dim3& block, size_t shared_bytes,
                   const char* name);

template <class Argument, class Dim>
void launch(void (*kernel)(Argument), const Dim& grid, const Dim& block, size_t shared_bytes,
            const Argument& argument, const char* name) {
  const auto body = [](const void* function, const void* value) {
    alignas(Argument) unsigned char copy[sizeof(Argument)];  // on the thread's own stack
    copy_argument(copy, value, sizeof(Argument));
    reinterpret_cast<void (*)(Argument)>(const_cast<void*>(function))(
        *reinterpret_cast<Argument*>(copy));
  };
  launch_erased(body, reinterpret_cast<const void*>(kernel), &argument, grid, block, shared_bytes,
                name);
}

// ---- what the kernels call, through launch.h, memory.cuh and ptx.cuh
// -----------------------------

void* shared_memory();
void load(void* to, const void* from, size_t bytes);
void store(void* to, const void* from, size_t bytes);

void sync_block(int line);
void sync_warp(unsigned mask);
void shuffle(unsigned mask, void* value, size_t bytes, int from_lane);
unsigned ballot(unsigned mask, bool predicate);

void copy_async(void* s_to, const void* from, int bytes, int valid_bytes);
void copy_async_commit();
void copy_async_wait(int groups);

void ldmatrix(uint32_t* r, const void* s_row, int matrices, bool transposed);
template <class T>
void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b);
void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b);
void mma_8x8x4(double* c, double a, double b);

// sm_90a: see csrc/cuda/ptx_sm90a.cuh.
uint32_t shared_address(const void* pointer);
void mbarrier_init(void* s_barrier, int arrivals);
void mbarrier_arrive(void* s_barrier, int expected_bytes);
void mbarrier_wait(void* s_barrier, unsigned parity);
void fence_async_proxy();
void copy_bulk(void* s_to, const void* from, int bytes, void* s_barrier);
void wgmma_fence();
template <class T>
void wgmma(float* sums, int columns, uint64_t a, uint64_t b, bool transposed);
void wgmma_commit();
void wgmma_wait(int groups);

}  // namespace emulation
