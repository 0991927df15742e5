#include "gemm_launch.cuh"

namespace deconv {
namespace cuda {
const GemmKernels kGemmBFloat16 = gemm_kernels<BFloat16, kMma16>();
}  // namespace cuda
}  // namespace deconv
