// How every kernel is launched: by pointer, one plain struct as argument, errors as exceptions. No
// chevrons, so that a C++ compiler takes the very same sources: tests/cuda_on_cpu runs them on the
// CPU, with the stand-in of <cuda_runtime_api.h> that lies there.
//
// What that asks of a kernel:
//
// * one argument, a plain struct (trivially copyable, at most 4096 bytes);
// * shared memory only through shared_memory<T>() of memory.cuh, no static __shared__ array;
// * accesses of more than one element through load() and store() of memory.cuh, and whatever needs
//   an instruction by name through ptx.cuh, the only file with inline assembly;
// * no thread returns before a __syncthreads(), and warp collectives take all 32 lanes (mask
//   0xffffffff);
// * blocks do not wait for each other: what crosses blocks is a second kernel's work.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace deconv {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " +
                             cudaGetErrorString(error));
}

constexpr size_t kDefaultSharedBytes = 48 * 1024;  // more has to be asked for, per kernel

// Enqueues the kernel; `shared_bytes` of dynamic shared memory a block. A grid without blocks is no
// launch.
template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Argument& argument, const char* name) {
  static_assert(std::is_trivially_copyable<Argument>::value, "a kernel takes one plain struct");
  static_assert(sizeof(Argument) <= 4096, "the argument has to fit CUDA's parameter space");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(DECONV_CUDA_ON_CPU)
  emulation::launch(kernel, grid, block, shared_bytes, argument, name);
  (void)stream;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kDefaultSharedBytes)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernel(function, grid, block, arguments, shared_bytes,
                         static_cast<cudaStream_t>(stream)),
        name);
#endif
}

// Whether the kernel, as it was compiled for this device, takes blocks of so many threads.
template <class Argument>
bool accepts(void (*kernel)(Argument), int threads) {
#if defined(DECONV_CUDA_ON_CPU)
  (void)kernel;
  return threads <= 1024;
#else
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)),
        "cudaFuncGetAttributes");
  return threads <= attributes.maxThreadsPerBlock;
#endif
}

}  // namespace cuda
}  // namespace deconv
