// One product of fragments, C = A B, by one warp: A is x [M, K], B is w [K, 8], C is y [M, 8] in
// float32 or float64. Fragments are filled as the tables of the PTX ISA say, element by element;
// "_ldmatrix" gets them from shared memory.
#include "planted.h"

namespace planted {
namespace {

using namespace deconv;
using namespace deconv::cuda;

struct Arguments {
  const void* a;
  const void* b;
  void* c;
};

template <class Sum>
__device__ void write(void* to, const Sum* c, int rows) {
  const int group = static_cast<int>(threadIdx.x) / 4, pair = static_cast<int>(threadIdx.x) % 4 * 2;
  for (int i = 0; i < rows / 4; ++i)
    static_cast<Sum*>(to)[(group + i / 2 * 8) * 8 + pair + i % 2] = c[i];
}

// T: how the operands lie in memory. C is written as float32 bits into a tensor of T twice as wide
// where T has 16 bits, so the caller gives y as T [M, 16].
template <class T, bool kWrong>
__global__ void mma_16(Arguments p) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
  uint32_t fa[4] = {}, fb[2] = {};
  for (int i = 0; i < 8; ++i) {
    const bool low_row =
        kWrong ? i < 4 : i < 2 || (i >= 4 && i < 6);  // the manual: 0 <= i < 2 || 4 <= i < 6
    const int row = low_row ? group : group + 8;
    const bool low_column = kWrong ? i < 2 || (i >= 4 && i < 6) : i < 4;  // the manual: i < 4
    const int column = in_group * 2 + (i & 1) + (low_column ? 0 : 8);
    fa[i / 2] |= static_cast<uint32_t>(a[row * 16 + column].bits) << 16 * (i % 2);
  }
  for (int i = 0; i < 4; ++i) {
    const int row = in_group * 2 + (i & 1) + (i < 2 ? 0 : 8);
    fb[i / 2] |= static_cast<uint32_t>(b[row * 8 + group].bits) << 16 * (i % 2);
  }
  float c[4] = {};
  mma_16x8x16<T>(c, fa, fb);
  write(p.c, c, 16);
}

template <class T>
__global__ void mma_16_ldmatrix(Arguments p) {
  T* s_a = shared_memory<T>();
  T* s_b = s_a + 16 * 16;
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 16; i += 32) s_a[i] = static_cast<const T*>(p.a)[i];
  for (int i = lane; i < 16 * 8; i += 32) s_b[i] = static_cast<const T*>(p.b)[i];
  __syncthreads();
  uint32_t fa[4], fb[2];
  ldmatrix<4>(fa, s_a + lane % 16 * 16 + lane / 16 * 8);
  ldmatrix<2, true>(fb, s_b + lane % 16 * 8);
  float c[4] = {};
  mma_16x8x16<T>(c, fa, fb);
  write(p.c, c, 16);
}

__global__ void mma_tf32(Arguments p) {
  const float* a = static_cast<const float*>(p.a);
  const float* b = static_cast<const float*>(p.b);
  const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const int row = i == 0 || i == 2 ? group : group + 8;
    const int column = i < 2 ? in_group : in_group + 4;
    fa[i] = to_tf32(a[row * 8 + column]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(in_group + i * 4) * 8 + group]);
  float c[4] = {};
  mma_16x8x8_tf32(c, fa, fb);
  write(p.c, c, 16);
}

__global__ void mma_64(Arguments p) {
  const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
  double c[2] = {};
  mma_8x8x4(c, static_cast<const double*>(p.a)[group * 4 + in_group],
            static_cast<const double*>(p.b)[in_group * 8 + group]);
  write(p.c, c, 8);
}

// y[matrix][row][column] = what lane 4 row + column / 2 got; x holds 32 rows of 8.
template <int kMatrices, bool kTransposed>
__global__ void ldmatrix_alone(Arguments p) {
  Float16* s = shared_memory<Float16>();
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) s[lane * 8 + i] = static_cast<const Float16*>(p.a)[lane * 8 + i];
  __syncthreads();
  uint32_t r[kMatrices];
  ldmatrix<kMatrices, kTransposed>(r, s + lane * 8);
  for (int m = 0; m < 4; ++m) static_cast<uint32_t*>(p.c)[m * 32 + lane] = m < kMatrices ? r[m] : 0;
}

// Rounded and packed as the hardware's conversions do: y = x, through float32.
template <class T>
__global__ void conversions(Arguments p) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t pair = load(static_cast<const uint32_t*>(p.a) + lane);
  const T low{static_cast<uint16_t>(pair)}, high{static_cast<uint16_t>(pair >> 16)};
  static_cast<uint32_t*>(p.c)[lane] = pack<T>(widen(low), widen(high));
}

template <void (*kernel)(Arguments)>
void run(const Params& p) {
  launch(kernel, dim3(1), dim3(32), 1024, nullptr, Arguments{p.x.data, p.w.data, p.y.data},
         "fragments");
}

}  // namespace

const Kernels kFragments = {{"mma_float16", run<mma_16<Float16, false>>},
                            {"mma_bfloat16", run<mma_16<BFloat16, false>>},
                            {"mma_float16_wrong", run<mma_16<Float16, true>>},
                            {"mma_float16_ldmatrix", run<mma_16_ldmatrix<Float16>>},
                            {"mma_bfloat16_ldmatrix", run<mma_16_ldmatrix<BFloat16>>},
                            {"mma_float32", run<mma_tf32>},
                            {"mma_float64", run<mma_64>},
                            {"ldmatrix_1", run<ldmatrix_alone<1, false>>},
                            {"ldmatrix_2", run<ldmatrix_alone<2, false>>},
                            {"ldmatrix_4", run<ldmatrix_alone<4, false>>},
                            {"ldmatrix_1_transposed", run<ldmatrix_alone<1, true>>},
                            {"ldmatrix_2_transposed", run<ldmatrix_alone<2, true>>},
                            {"ldmatrix_4_transposed", run<ldmatrix_alone<4, true>>},
                            {"conversions_float16", run<conversions<Float16>>},
                            {"conversions_bfloat16", run<conversions<BFloat16>>}};

}  // namespace planted
