// Every configuration that may be forced, as "algorithm:configuration".
#include "../../csrc/cuda/configs.h"
#include "../../csrc/cuda/direct.h"
#include "../../csrc/deconv.h"

extern "C" const char* emulation_configurations(int op) {
  static std::string text;
  text.clear();
  for (const std::string& name : deconv::cuda::direct_configs(static_cast<deconv::Op>(op)))
    text += "direct:" + name + " ";
  if (static_cast<deconv::Op>(op) == deconv::Op::kGradWeight) {
    for (const auto& tile : deconv::cuda::kWeightTiles)
      text += std::string("gemm:") + tile.name + " ";
  } else {
    for (const auto& tile : deconv::cuda::kGatherTiles)
      text += std::string("gemm:") + tile.name + " ";
  }
  return text.c_str();
}
