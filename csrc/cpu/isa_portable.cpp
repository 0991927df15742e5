// The CPU kernels for whatever the compiler targets by default: 16-byte vectors, which every 64-bit
// machine has.
#define DECONV_ISA portable
#define DECONV_VECTOR_BYTES 16
#define DECONV_VECTOR_REGISTERS 16
#include "instantiate.h"

namespace deconv {
namespace cpu {
const Kernels* portable_kernels() {
  static const Kernels kernels = portable::table("portable", [] { return true; });
  return &kernels;
}
}  // namespace cpu
}  // namespace deconv
