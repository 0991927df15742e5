// Each kernel with a mistake and without. All copy x to y, 2 blocks of 64 threads, or would.
#include "planted.h"

namespace planted {
namespace {

using namespace deconv::cuda;

constexpr int kThreads = 64, kBlocks = 2;

struct Arguments {
  float* x;  // [kBlocks * kThreads], an input
  float* y;  // as many
};

__device__ int element() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

template <bool kRight>
__global__ void missing_barrier(Arguments a) {
  float* s = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x), mirrored = kThreads - 1 - t;
  s[t] = a.x[element()];
  if (kRight) __syncthreads();
  a.y[static_cast<int>(blockIdx.x) * kThreads + mirrored] = s[mirrored];
}

// The second tile overwrites the first while others still read it.
template <bool kRight>
__global__ void missing_second_barrier(Arguments a) {
  float* s = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x), mirrored = kThreads - 1 - t;
  float sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if (kRight && turn) __syncthreads();
    s[t] = a.x[element()];
    __syncthreads();
    sum += s[mirrored];
  }
  a.y[static_cast<int>(blockIdx.x) * kThreads + mirrored] = sum / 2;
}

// The neighbour is in the same warp: a warp barrier is enough, and needed.
template <bool kRight>
__global__ void missing_warp_barrier(Arguments a) {
  float* s = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x);
  s[t] = a.x[element()];
  if (kRight) __syncwarp();
  a.y[element() ^ 1] = s[t ^ 1];
}

template <bool kRight>
__global__ void out_of_bounds_store(Arguments a) {
  a.y[element() + (kRight ? 0 : 1)] = a.x[element()];
}

template <bool kRight>
__global__ void out_of_bounds_load(Arguments a) {
  a.y[element()] = a.x[element()];
  if (!kRight && threadIdx.x == 0) a.y[element()] = a.x[-1];
}

template <bool kRight>
__global__ void out_of_bounds_shared(Arguments a) {
  float* s = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x) + (kRight ? 0 : 1);
  s[t] = a.x[element()];
  a.y[element()] = s[t];
}

template <bool kRight>
__global__ void misaligned_vector(Arguments a) {
  using Four = Vector<float, 4>;
  const int begin = element() / 4 * 4 + (kRight ? 0 : 1);
  if (threadIdx.x % 4 == 0 && begin + 4 <= kBlocks * kThreads)
    store(reinterpret_cast<Four*>(a.y + begin), load(reinterpret_cast<const Four*>(a.x + begin)));
}

template <bool kRight>
__global__ void misaligned_element(Arguments a) {
  const char* bytes = reinterpret_cast<const char*>(a.x + element()) + (kRight ? 0 : 2);
  if (element() + 1 < kBlocks * kThreads)
    a.y[element()] = *reinterpret_cast<const float*>(bytes);
  else
    a.y[element()] = a.x[element()];
}

// How many groups may be in flight after the wait; -1: no wait.
template <int kWait, bool kBarrier, bool kMirrored>
__device__ void copy_through_shared(const Arguments& a) {
  float* s = shared_memory<float>();
  const int t = static_cast<int>(threadIdx.x), from = kMirrored ? kThreads - 1 - t : t;
  copy_async<4>(s + t, a.x + element());
  copy_async_commit();
  if (kWait == 0) copy_async_wait<0>();
  if (kWait == 1) copy_async_wait<1>();
  if (kBarrier) __syncthreads();
  a.y[static_cast<int>(blockIdx.x) * kThreads + from] = s[from];
  copy_async_wait<0>();
}

template <bool kRight>
__global__ void early_read(Arguments a) {
  copy_through_shared<kRight ? 0 : -1, true, true>(a);
}
template <bool kRight>
__global__ void wait_for_too_few(Arguments a) {
  copy_through_shared<kRight ? 0 : 1, true, true>(a);
}
template <bool kRight>
__global__ void copy_without_barrier(Arguments a) {
  copy_through_shared<0, kRight, true>(a);
}

template <bool kRight>
__global__ void copy_never_awaited(Arguments a) {
  float* s = shared_memory<float>();
  a.y[element()] = a.x[element()];
  copy_async<4>(s + threadIdx.x, a.x + element());
  copy_async_commit();
  if (kRight) copy_async_wait<0>();
}

template <bool kRight>
__global__ void misaligned_copy(Arguments a) {
  float* s = shared_memory<float>();
  const int begin = static_cast<int>(threadIdx.x) / 4 * 4, shift = kRight ? 0 : 1;
  if (threadIdx.x % 4 == 0) {
    copy_async<16>(s + begin, a.x + element() + shift, 12);
    copy_async_commit();
    copy_async_wait<0>();
  }
  __syncthreads();
  a.y[element()] = threadIdx.x % 4 == 3 ? s[threadIdx.x] + a.x[element()] : s[threadIdx.x];
}

template <bool kRight>
__global__ void uninitialised_shared(Arguments a) {
  float* s = shared_memory<float>();
  if (kRight || threadIdx.x != 7) s[threadIdx.x] = 0;
  __syncthreads();
  a.y[element()] = a.x[element()] + s[threadIdx.x];
}

template <bool kRight>
__global__ void uninitialised_output(Arguments a) {
  if (kRight) a.y[element()] = 0;
  a.y[element()] += a.x[element()];
}

template <bool kRight>
__global__ void divergent_barrier(Arguments a) {
  if (kRight || threadIdx.x < 32) __syncthreads();
  a.y[element()] = a.x[element()];
}

template <bool kRight>
__global__ void two_barriers(Arguments a) {
  if (kRight || threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads(), a.y[element()] = 0;
  a.y[element()] = a.x[element()];
}

template <bool kRight>
__global__ void return_before_barrier(Arguments a) {
  if (!kRight && threadIdx.x == 63) return;
  __syncthreads();
  a.y[element()] = a.x[element()];
}

template <bool kRight>
__global__ void divergent_shuffle(Arguments a) {
  float value = a.x[element()];
  if (kRight || threadIdx.x < 40) value = __shfl_xor_sync(~0u, value, 1);
  a.y[element() ^ 1] = value;
}

template <bool kRight>
__global__ void partial_mask(Arguments a) {
  a.y[element() ^ 1] = __shfl_xor_sync(kRight ? ~0u : 0xffffu, a.x[element()], 1);
}

template <bool kRight>
__global__ void two_blocks_write_one_address(Arguments a) {
  a.y[element()] = a.x[element()];
  if (!kRight && threadIdx.x == 0) a.y[5] = a.x[5];
}

template <bool kRight>
__global__ void two_threads_write_one_address(Arguments a) {
  a.y[element()] = a.x[element()];
  if (!kRight && threadIdx.x == 0) a.y[element() + 1] = a.x[element() + 1];
}

template <bool kRight>
__global__ void read_of_another_block(Arguments a) {
  a.y[element()] = a.x[element()];
  const int other = kRight ? element() : (element() + kThreads) % (kBlocks * kThreads);
  if (a.y[other] != a.y[other]) a.y[element()] = 0;
}

template <bool kRight>
__global__ void write_to_input(Arguments a) {
  if (!kRight) a.x[element()] = 0;
  a.y[element()] = a.x[element()];
}

// The numbers are wrong, as they would be on a device: two lanes' accumulators exchanged.
template <bool kRight>
__global__ void wrong_lane(Arguments a) {
  a.y[element()] =
      __shfl_sync(~0u, a.x[element()], static_cast<int>(threadIdx.x) ^ (kRight ? 0 : 2));
}

template <void (*kernel)(Arguments)>
void run(const deconv::Params& p) {
  const Arguments arguments{static_cast<float*>(p.x.data), static_cast<float*>(p.y.data)};
  launch(kernel, dim3(kBlocks), dim3(kThreads), kThreads * sizeof(float), nullptr, arguments,
         "planted");
}

}  // namespace

#define BOTH(name) \
  {#name, run<name<false>>}, { #name "_right", run<name<true>> }
const Kernels kMistakes = {BOTH(missing_barrier),
                           BOTH(missing_second_barrier),
                           BOTH(missing_warp_barrier),
                           BOTH(out_of_bounds_store),
                           BOTH(out_of_bounds_load),
                           BOTH(out_of_bounds_shared),
                           BOTH(misaligned_vector),
                           BOTH(misaligned_element),
                           BOTH(early_read),
                           BOTH(wait_for_too_few),
                           BOTH(copy_without_barrier),
                           BOTH(copy_never_awaited),
                           BOTH(misaligned_copy),
                           BOTH(uninitialised_shared),
                           BOTH(uninitialised_output),
                           BOTH(divergent_barrier),
                           BOTH(two_barriers),
                           BOTH(return_before_barrier),
                           BOTH(divergent_shuffle),
                           BOTH(partial_mask),
                           BOTH(two_blocks_write_one_address),
                           BOTH(two_threads_write_one_address),
                           BOTH(read_of_another_block),
                           BOTH(write_to_input),
                           BOTH(wrong_lane)};
#undef BOTH

}  // namespace planted
