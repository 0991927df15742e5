// How every kernel is launched: by pointer, one plain struct as argument, errors as exceptions. No
// chevrons, so that this is ordinary C++.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace deconv {
namespace cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA error in ") + what + ": " +
                             cudaGetErrorString(error));
}

template <class Argument>
void launch(void (*kernel)(Argument), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            const Argument& argument, const char* name) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                         shared_bytes, static_cast<cudaStream_t>(stream)),
        name);
}

}  // namespace cuda
}  // namespace deconv
