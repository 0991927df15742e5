#include "wgmma_launch.cuh"

namespace deconv {
namespace cuda {
const WgmmaKernels kWgmmaFloat16 = wgmma_kernels<Float16>();
}  // namespace cuda
}  // namespace deconv
