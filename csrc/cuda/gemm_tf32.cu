#include "gemm_launch.cuh"

namespace deconv {
namespace cuda {
const GemmKernels kGemmTf32 = gemm_kernels<float, kTf32>();
}  // namespace cuda
}  // namespace deconv
