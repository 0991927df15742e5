// Kernels that test the emulator: by name, with x and w as they please, and y to write.
#pragma once

#include <map>
#include <string>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/memory.cuh"
#include "../../../csrc/cuda/ptx.cuh"
#include "../../../csrc/params.h"

namespace planted {

using Kernels = std::map<std::string, void (*)(const deconv::Params&)>;

extern const Kernels kMistakes;  // "name" and, without the mistake, "name_right"
extern const Kernels kFragments;
extern const Kernels kTraffic;
extern const Kernels kAsynchronous;

}  // namespace planted
