// The torch-free interface: bindings, C++ tests and the CUDA emulation link against this and
// nothing else.
#pragma once

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
void run(Op op, const Params& params, const std::string& algorithm, void* stream);
void grad_bias(const GradBiasParams& params, void* stream);
std::vector<std::string> algorithms(Op op);
}  // namespace cuda

}  // namespace deconv
