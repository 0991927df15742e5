// Kernels whose memory traffic is known: 2 blocks of one warp copy 32 x 32 floats each.
#include "planted.h"

namespace planted {
namespace {

using namespace deconv::cuda;

struct Arguments {
  const float* x;
  float* y;
};

// Transposed through shared memory with rows of `kPitch` words: 32 passes a column where kPitch is
// a multiple of 32, one where it is odd.
template <int kPitch>
__global__ void transpose(Arguments a) {
  float* s = shared_memory<float>();
  const int lane = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * 1024;
  for (int row = 0; row < 32; ++row) s[row * kPitch + lane] = a.x[base + row * 32 + lane];
  __syncthreads();
  for (int row = 0; row < 32; ++row) a.y[base + row * 32 + lane] = s[lane * kPitch + row];
}

// A column at a time: each store touches 32 sectors.
__global__ void copy_columns(Arguments a) {
  const int lane = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * 1024;
  for (int i = 0; i < 32; ++i) a.y[base + lane * 32 + i] = a.x[base + lane * 32 + i];
}

__global__ void copy_vectors(Arguments a) {
  using Four = Vector<float, 4>;
  const int lane = static_cast<int>(threadIdx.x), base = static_cast<int>(blockIdx.x) * 256;
  for (int i = lane; i < 256; i += 32)
    store_streaming(reinterpret_cast<Four*>(a.y) + base + i,
                    load_read_only(reinterpret_cast<const Four*>(a.x) + base + i));
}

template <void (*kernel)(Arguments)>
void run(const deconv::Params& p) {
  launch(kernel, dim3(2), dim3(32), 33 * 32 * sizeof(float), nullptr,
         Arguments{static_cast<const float*>(p.x.data), static_cast<float*>(p.y.data)}, "traffic");
}

}  // namespace

const Kernels kTraffic = {{"transpose_pitch_32", run<transpose<32>>},
                          {"transpose_pitch_33", run<transpose<33>>},
                          {"copy_columns", run<copy_columns>},
                          {"copy_vectors", run<copy_vectors>}};

}  // namespace planted
