// The torch-free interface: bindings, C++ tests and the CUDA emulation link against this and
// nothing else.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "params.h"

namespace deconv {

// Each device keeps, per operation, a list of algorithms, best first, the reference last. `run`
// takes the first that accepts the problem; a forced one that does not accept it throws
// std::invalid_argument with the condition that failed.
namespace cpu {
void run(Op op, const Params& params, const std::string& algorithm, int threads);
void grad_bias(const GradBiasParams& params, int threads);
std::vector<std::string> algorithms(Op op);

// Instruction sets that are compiled in and that this machine has, best first; the one in use; its
// change (throws on unknown).
std::vector<std::string> isas();
std::string isa();
void set_isa(const std::string& name);
}  // namespace cpu

namespace cuda {
// What a call may use besides its operands. Nothing in here synchronises, so that a call can be
// captured in a CUDA graph.
struct Context {
  void* stream;  // cudaStream_t
  // Device memory, 256-byte aligned, that stays valid for the kernels this call enqueues.
  std::function<void*(std::size_t bytes)> workspace;
  bool allow_tf32;  // torch's setting for convolutions; float32 otherwise means IEEE float32
};

void run(Op op, const Params& params, const std::string& algorithm, const Context& context);
void grad_bias(const GradBiasParams& params, const Context& context);
// Every name that may be forced, the configurations of an algorithm as "name:configuration".
std::vector<std::string> algorithms(Op op);
}  // namespace cuda

}  // namespace deconv
