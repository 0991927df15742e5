// grad_bias: db[c] = sum over n, h, w of dy[n, c, h, w], in two kernels and a fixed order.
//
// Schedule. Planes without gaps are read as one long row. A block sums a share of the rows for
// `lanes` channel vectors: lanes along the row in NCHW, along channels in channels_last, 16 bytes
// an access where aligned. Each thread adds every so-many-th vector into registers, element by
// element; the block adds its threads in shared memory ([thread][element] sums, halving the
// distance); the second kernel adds the blocks of a channel one after the other.
//
// The number of shares depends on the problem alone. Roofline: |dy| bytes once.
#include <algorithm>

#include "launch.h"
#include "memory.cuh"
#include "reduce.h"

namespace deconv {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostLanes = 32;
constexpr int64_t kEnoughBlocks = 4 * 132;  // of a large GPU, each to have eight warps a scheduler
constexpr int64_t kMostShares = 256;

struct GradBiasArgs {
  const void* dy;
  int64_t stride[4];  // sample, channel, row, column
  int64_t samples, rows, columns, channels, shares;
  int32_t channel_lanes;  // a power of two
  bool vectors;
  void *partial, *db;  // [shares][channels] sums; [channels]
};

__device__ __forceinline__ int64_t blocks_of(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// kAcross: a vector holds neighbouring channels of a pixel, else neighbouring columns of a channel.
template <class T, bool kAcross>
__global__ void __launch_bounds__(kThreads) grad_bias_partial_kernel(GradBiasArgs a) {
  using Sum = typename Arithmetic<T>::type;
  constexpr int kVector = 16 / sizeof(T), kChannels = kAcross ? kVector : 1;
  Sum* s_sum = shared_memory<Sum>();

  const int lanes = a.channel_lanes, lane = threadIdx.x % lanes, others = kThreads / lanes;
  const int64_t channel_blocks = blocks_of(a.channels, int64_t(lanes) * kChannels);
  const int64_t share = blockIdx.x / channel_blocks;
  const int64_t channel = (blockIdx.x % channel_blocks * lanes + lane) * kChannels;
  const int64_t per_row = kAcross ? a.columns : blocks_of(a.columns, kVector);
  const int64_t all_rows = a.samples * a.rows;
  const int64_t begin = all_rows * share / a.shares, end = all_rows * (share + 1) / a.shares;

  Sum sum[kVector] = {};
  if (channel < a.channels) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = static_cast<const T*>(a.dy) + row / a.rows * a.stride[0] +
                      channel * a.stride[1] + row % a.rows * a.stride[2];
      for (int64_t i = threadIdx.x / lanes; i < per_row; i += others) {
        const int64_t column = kAcross ? i : i * kVector;
        const T* at = from + column * a.stride[3];
        const int64_t count = kAcross ? a.channels - channel : a.columns - column;
        const int64_t step = a.stride[kAcross ? 1 : 3];
        if (a.vectors && count >= kVector) {
          const Vector<T, kVector> v =
              load_streaming(reinterpret_cast<const Vector<T, kVector>*>(at));
#pragma unroll
          for (int e = 0; e < kVector; ++e) sum[e] += convert<Sum>(v.at[e]);
        } else {
#pragma unroll
          for (int e = 0; e < kVector; ++e)
            if (e < count) sum[e] += convert<Sum>(at[e * step]);
        }
      }
    }
  }
  if (!kAcross) {
#pragma unroll
    for (int e = 1; e < kVector; ++e) sum[0] += sum[e];
  }
#pragma unroll
  for (int e = 0; e < kChannels; ++e) s_sum[e * kThreads + threadIdx.x] = sum[e];
  for (int half = kThreads / 2; half >= lanes; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) {
#pragma unroll
      for (int e = 0; e < kChannels; ++e)
        s_sum[e * kThreads + threadIdx.x] += s_sum[e * kThreads + threadIdx.x + half];
    }
  }
  __syncthreads();
  if (threadIdx.x < lanes) {
#pragma unroll
    for (int e = 0; e < kChannels; ++e)
      if (channel + e < a.channels)
        static_cast<Sum*>(a.partial)[share * a.channels + channel + e] =
            s_sum[e * kThreads + threadIdx.x];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) grad_bias_kernel(GradBiasArgs a) {
  using Sum = typename Arithmetic<T>::type;
  const int64_t channel = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (channel >= a.channels) return;
  Sum sum = 0;
#pragma unroll 8
  for (int64_t share = 0; share < a.shares; ++share)
    sum += static_cast<const Sum*>(a.partial)[share * a.channels + channel];
  static_cast<T*>(a.db)[channel] = convert<T>(sum);
}

template <class T>
void grad_bias_typed(const GradBiasParams& p, const Context& context) {
  using Sum = typename Arithmetic<T>::type;
  constexpr int kVector = 16 / sizeof(T);
  GradBiasArgs a{p.dy.data, {}, p.batch, p.out_h, p.out_w, p.c_out, 1, 1, false, nullptr, p.db};
  std::copy_n(p.dy.stride, 4, a.stride);
  const bool across = a.stride[1] == 1 && a.channels > 1;
  a.vectors = reinterpret_cast<uintptr_t>(a.dy) % 16 == 0 && a.stride[across ? 1 : 3] == 1;
  for (int i = 0; i < 4; ++i)
    if (i != (across ? 1 : 3) && a.stride[i] % kVector != 0) a.vectors = false;
  const int64_t vectors = across ? ceil_div(a.channels, kVector) : 1;
  // Planes without gaps are one long row, if there are samples enough to share out.
  if (a.stride[2] == a.columns * a.stride[3] &&
      a.samples * (across ? vectors : a.channels) >= kEnoughBlocks) {
    a.columns *= a.rows;
    a.rows = 1;
  }
  while (a.channel_lanes < kMostLanes && a.channel_lanes < vectors) a.channel_lanes *= 2;
  const int64_t channel_blocks = ceil_div(vectors, a.channel_lanes) * (across ? 1 : a.channels);
  a.shares = std::max<int64_t>(
      1, std::min({a.samples * a.rows, kMostShares, ceil_div(kEnoughBlocks, channel_blocks)}));
  a.partial = context.workspace(static_cast<size_t>(a.shares * a.channels) * sizeof(Sum));
  const dim3 grid(static_cast<unsigned>(channel_blocks * a.shares));
  launch(across ? grad_bias_partial_kernel<T, true> : grad_bias_partial_kernel<T, false>, grid,
         dim3(kThreads), kThreads * sizeof(Sum) * (across ? kVector : 1), context.stream, a,
         "grad_bias_partial");
  launch(grad_bias_kernel<T>, dim3(static_cast<unsigned>(ceil_div(a.channels, kThreads))),
         dim3(kThreads), 0, context.stream, a, "grad_bias");
}

}  // namespace

void reduce_grad_bias(const GradBiasParams& p, const Context& context) {
  switch (p.dtype) {
    case Dtype::kFloat32:
      return grad_bias_typed<float>(p, context);
    case Dtype::kFloat64:
      return grad_bias_typed<double>(p, context);
    case Dtype::kFloat16:
      return grad_bias_typed<Float16>(p, context);
    case Dtype::kBFloat16:
      return grad_bias_typed<BFloat16>(p, context);
    case Dtype::kInt64:
      throw std::logic_error("integers are summed by generic_grad_bias");
  }
}

}  // namespace cuda
}  // namespace deconv
