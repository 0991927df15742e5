// grad_weight by direct sums, for few channels a group and large kernels:
//
//     dw[ci, co, kh, kw] = sum over n, ih, iw of x[n, ci, ih, iw] * dy[n, co, ih * stride_h +
//                          offset[kh], iw * stride_w + offset[kw]]
//
// Schedule. A block sums, for one kh, a share of the rows (n, ih): its warps take every kWarps-th
// row, its lanes are [pair of channels fastest][kw][iw]. Pairs lie along lanes where channels are
// contiguous, pixels where rows are. Lanes of one element are added by shuffles, warps in
// shared memory ([warp][lane]), shares by a second kernel: all in a fixed order that depends on the
// problem alone. x is read once for each kh and dy once for each row of x that it meets, from L1 or
// L2 after the first time. Roofline: |x| + |dy| bytes once.
#include <algorithm>

#include "direct.h"
#include "direct_memory.cuh"
#include "direct_plan.h"
#include "launch.h"

namespace deconv {
namespace cuda {
namespace direct {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int64_t kEnoughBlocks = 8 * 132;  // of a large GPU
constexpr int64_t kMostShares = 256;

struct WeightArgs {
  const void *x, *dy;
  void *dw, *partial;
  int64_t x_stride[4], dy_stride[4], dw_stride[4];
  int64_t samples, shares;
  int32_t group_in, group_out, pairs, kernel_h, kernel_w;
  int32_t in_h, in_w, out_h, out_w, step_h, step_w;
  int32_t pair_lanes, k_lanes, pair_blocks, k_blocks;  // lanes: powers of two
  int32_t offset_h[kMostTaps], offset_w[kMostTaps];
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_weight_direct_kernel(const __grid_constant__ WeightArgs a) {
  using Sum = typename Arithmetic<T>::type;
  Sum* s_sum = shared_memory<Sum>();

  unsigned block = blockIdx.x;
  const int k_block = block % a.k_blocks;
  block /= a.k_blocks;
  const int kh = block % a.kernel_h;
  block /= a.kernel_h;
  const int pair_block = block % a.pair_blocks;
  const int64_t share = block / a.pair_blocks;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int pair = pair_block * a.pair_lanes + lane % a.pair_lanes;
  const int kw = k_block * a.k_lanes + lane / a.pair_lanes % a.k_lanes;
  const int elements = a.pair_lanes * a.k_lanes, pixel_lanes = 32 / elements;
  const bool exists = pair < a.pairs && kw < a.kernel_w;

  Sum sum = 0;
  if (exists) {
    const int ci = pair / a.group_out;
    const int co = ci / a.group_in * a.group_out + pair % a.group_out;
    const int offset = a.offset_w[kw];
    const int64_t rows = a.samples * a.in_h;
    const int64_t end = rows * (share + 1) / a.shares;
    for (int64_t row = rows * share / a.shares + warp; row < end; row += kWarps) {
      const int64_t n = row / a.in_h;
      const int ih = static_cast<int>(row % a.in_h), oh = ih * a.step_h + a.offset_h[kh];
      if (static_cast<unsigned>(oh) >= static_cast<unsigned>(a.out_h)) continue;
      const T* x =
          static_cast<const T*>(a.x) + n * a.x_stride[0] + ci * a.x_stride[1] + ih * a.x_stride[2];
      const T* dy = static_cast<const T*>(a.dy) + n * a.dy_stride[0] + co * a.dy_stride[1] +
                    oh * a.dy_stride[2];
#pragma unroll 4
      for (int iw = lane / elements; iw < a.in_w; iw += pixel_lanes) {
        const int ow = iw * a.step_w + offset;
        if (static_cast<unsigned>(ow) < static_cast<unsigned>(a.out_w))
          sum += read<Sum>(x + iw * static_cast<int>(a.x_stride[3])) *
                 read<Sum>(dy + ow * static_cast<int>(a.dy_stride[3]));
      }
    }
  }
  for (int apart = 16; apart >= elements; apart /= 2)
    sum += __shfl_xor_sync(0xffffffff, sum, apart);
  s_sum[threadIdx.x] = sum;
  __syncthreads();
  if (warp == 0 && lane < elements && exists) {
    for (int other = 1; other < kWarps; ++other) sum += s_sum[other * 32 + lane];
    const int64_t index = (int64_t(pair) * a.kernel_h + kh) * a.kernel_w + kw;
    static_cast<Sum*>(a.partial)[share * a.pairs * a.kernel_h * a.kernel_w + index] = sum;
  }
}

// One thread an element of dw: its shares in order.
template <class T>
__global__ void __launch_bounds__(kThreads)
    grad_weight_shares_kernel(const __grid_constant__ WeightArgs a) {
  using Sum = typename Arithmetic<T>::type;
  const int64_t count = int64_t(a.pairs) * a.kernel_h * a.kernel_w;
  const int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= count) return;
  Sum sum = 0;
#pragma unroll 8
  for (int64_t share = 0; share < a.shares; ++share)
    sum += static_cast<const Sum*>(a.partial)[share * count + index];
  const int kw = static_cast<int>(index % a.kernel_w);
  const int kh = static_cast<int>(index / a.kernel_w % a.kernel_h);
  const int pair = static_cast<int>(index / a.kernel_w / a.kernel_h);
  write(static_cast<T*>(a.dw) + pair / a.group_out * a.dw_stride[0] +
            pair % a.group_out * a.dw_stride[1] + kh * a.dw_stride[2] + kw * a.dw_stride[3],
        sum);
}

int lanes_for(int64_t count, int most) {
  int lanes = 1;
  while (lanes < count && lanes < most) lanes *= 2;
  return lanes;
}

// The output that each kernel element reaches from input 0; far outside if it reaches none.
void offsets_of(const Axis& axis, int32_t (&offset)[kMostTaps]) {
  std::fill(std::begin(offset), std::end(offset), -(1 << 30));
  const AxisTaps table = grad_input_taps(axis);
  const PhaseClass& taps = table.classes.front();
  for (size_t i = 0; i < taps.k.size(); ++i)
    offset[taps.k[i]] = static_cast<int32_t>(taps.offsets[i]);
}

template <class T>
void launch_typed(WeightArgs& a, const Context& context) {
  using Sum = typename Arithmetic<T>::type;
  const int64_t count = int64_t(a.pairs) * a.kernel_h * a.kernel_w;
  a.partial = context.workspace(static_cast<size_t>(a.shares * count) * sizeof(Sum));
  const int64_t blocks = a.shares * a.pair_blocks * a.kernel_h * a.k_blocks;
  launch(grad_weight_direct_kernel<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
         kThreads * sizeof(Sum), context.stream, a, "grad_weight_direct");
  launch(grad_weight_shares_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, kThreads))),
         dim3(kThreads), 0, context.stream, a, "grad_weight_shares");
}

}  // namespace

const char* weight_declines(const Params& p, const std::string& config) {
  const Problem& q = p.problem;
  if (!config.empty()) return "grad_weight has one configuration";
  if (p.dtype == Dtype::kInt64) return "it needs a floating point dtype";
  if (q.h.kernel > kMostTaps || q.w.kernel > kMostTaps)
    return "it needs kernels of at most 64 taps on an axis";
  if (const char* declined = too_large(p)) return declined;
  const int64_t elements = q.c_in * (q.c_out / q.groups) * q.h.kernel * q.w.kernel;
  return elements > 1 << 22 ? "it needs at most 2^22 weights" : nullptr;
}

void run_weight(const Params& p, const Context& context) {
  const Problem& q = p.problem;
  WeightArgs a{};
  a.x = p.x.data, a.dy = p.y.data, a.dw = p.w.data;
  std::copy_n(p.x.stride, 4, a.x_stride);
  std::copy_n(p.y.stride, 4, a.dy_stride);
  std::copy_n(p.w.stride, 4, a.dw_stride);
  a.samples = q.batch;
  a.group_in = static_cast<int32_t>(q.c_in / q.groups);
  a.group_out = static_cast<int32_t>(q.c_out / q.groups);
  a.pairs = static_cast<int32_t>(q.c_in) * a.group_out;
  a.kernel_h = static_cast<int32_t>(q.h.kernel), a.kernel_w = static_cast<int32_t>(q.w.kernel);
  a.in_h = static_cast<int32_t>(q.h.in), a.in_w = static_cast<int32_t>(q.w.in);
  a.out_h = static_cast<int32_t>(q.h.out), a.out_w = static_cast<int32_t>(q.w.out);
  a.step_h = static_cast<int32_t>(q.h.stride), a.step_w = static_cast<int32_t>(q.w.stride);
  offsets_of(q.h, a.offset_h);
  offsets_of(q.w, a.offset_w);
  const bool last = p.x.stride[1] == 1 && p.y.stride[1] == 1;
  a.pair_lanes = last ? lanes_for(a.pairs, 32) : 1;
  a.k_lanes = lanes_for(a.kernel_w, 32 / a.pair_lanes);
  a.pair_blocks = static_cast<int32_t>(ceil_div(a.pairs, a.pair_lanes));
  a.k_blocks = static_cast<int32_t>(ceil_div(a.kernel_w, a.k_lanes));
  const int64_t others = int64_t(a.pair_blocks) * a.kernel_h * a.k_blocks;
  a.shares = std::max<int64_t>(1, std::min({ceil_div(a.samples * a.in_h, kWarps), kMostShares,
                                            ceil_div(kEnoughBlocks, others)}));
  switch (p.dtype) {
    case Dtype::kFloat32:
      return launch_typed<float>(a, context);
    case Dtype::kFloat64:
      return launch_typed<double>(a, context);
    case Dtype::kFloat16:
      return launch_typed<Float16>(a, context);
    default:
      return launch_typed<BFloat16>(a, context);
  }
}

}  // namespace direct
}  // namespace cuda
}  // namespace deconv
