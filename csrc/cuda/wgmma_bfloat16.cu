#include "wgmma_launch.cuh"

namespace deconv {
namespace cuda {
const WgmmaKernels kWgmmaBFloat16 = wgmma_kernels<BFloat16>();
}  // namespace cuda
}  // namespace deconv
