#include "gemm_launch.cuh"

namespace deconv {
namespace cuda {
const GemmKernels kGemmFloat64 = gemm_kernels<double, kMma64>();
}  // namespace cuda
}  // namespace deconv
