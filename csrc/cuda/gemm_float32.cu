#include "gemm_launch.cuh"

namespace deconv {
namespace cuda {
const GemmKernels kGemmFloat32 = gemm_kernels<float, kFma32>();
}  // namespace cuda
}  // namespace deconv
