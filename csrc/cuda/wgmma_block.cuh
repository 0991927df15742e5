// What the blocks of the wgmma kernels have in common: one warpgroup that copies, two that
// multiply, and the ring of buffers between them.
#pragma once

#include "configs.h"
#include "ptx.cuh"
#include "ptx_sm90a.cuh"

namespace deconv {
namespace cuda {

constexpr int kWgmmaThreads = kWarpgroup * (1 + kWgmmaConsumers);
// Registers a thread: what the compiler gives all of a block of this size, and what copies and
// products get of them. More than the block was launched with are never to be had, so a sum too
// large would wait for ever.
constexpr int kLaunchRegisters = 65536 / kWgmmaThreads / 8 * 8;
constexpr int kCopyRegisters = 104, kProductRegisters = 200;
static_assert(kCopyRegisters + kWgmmaConsumers * kProductRegisters <=
                  (1 + kWgmmaConsumers) * kLaunchRegisters,
              "see above");

// Elsewhere than on sm_90a kernels are empty and take no block of this size; see wgmma.cpp.
#if DECONV_SM90A
#define DECONV_WGMMA_THREADS kWgmmaThreads
#else
#define DECONV_WGMMA_THREADS 32
#endif

// Which buffer is next, and the parity of the phase that its mbarriers are in.
struct Ring {
  int at = 0;
  unsigned parity = 0;
  __device__ __forceinline__ void next(int count) {
    if (++at == count) at = 0, parity ^= 1;
  }
};

// Says by the mbarriers `full`, one arrival a warp, which buffers this warp's copies have filled.
// The copies of a buffer may fly while the last one's are waited for; `lag`, the same at each call.
struct Filled {
  uint64_t* const full;
  int flying = -1;  // the buffer whose copies are in flight

  __device__ void arrive(int buffer) {
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(full + buffer);
  }
  __device__ void copied(int buffer, bool lag) {
    copy_async_commit();
    if (lag) {
      copy_async_wait<1>();
      if (flying >= 0) arrive(flying);
      flying = buffer;
    } else {
      copy_async_wait<0>();
      arrive(buffer);
    }
  }
  __device__ void finish() {
    copy_async_wait<0>();
    if (flying >= 0) arrive(flying);
  }
};

}  // namespace cuda
}  // namespace deconv
