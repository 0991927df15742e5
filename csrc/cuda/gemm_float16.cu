#include "gemm_launch.cuh"

namespace deconv {
namespace cuda {
const GemmKernels kGemmFloat16 = gemm_kernels<Float16, kMma16>();
}  // namespace cuda
}  // namespace deconv
