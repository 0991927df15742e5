// Prints what the planner of the CUDA matrix kernels decides, one line a problem read from standard
// input, products by number and 4 for wgmma: op product target_layout sms  batch c_in c_out groups
// h: in out kernel stride dilation pad w: the same. Lines out: the plan, then for each axis its
// taps.
#include <cstdio>
#include <iostream>
#include <stdexcept>
#include <string>

#include "../csrc/cuda/gemm_plan.h"
#include "../csrc/cuda/wgmma_plan.h"

using namespace deconv;
using namespace deconv::cuda;

namespace {

void contiguous(TensorRef* t, int64_t c, int64_t h, int64_t w, bool channels_last) {
  t->data = nullptr;
  if (channels_last)
    *t = {nullptr, {c * h * w, 1, w * c, c}};
  else
    *t = {nullptr, {c * h * w, h * w, w, 1}};
}

// Every (output of position j, kernel index, source) that the table describes.
void print_axis(const char* name, const AxisTable& t) {
  for (int set = 0; set < t.sets; ++set)
    for (int g = t.group[set]; g < t.group[set + 1]; ++g)
      for (int phase = t.phase[set]; phase < t.phase[set + 1]; ++phase) {
        const TapGroup& group = t.groups[g];
        for (int tap = group.tap[phase - t.phase[set]]; tap < group.tap[phase - t.phase[set] + 1];
             ++tap)
          std::printf("%s set %d group %d phase %d k %d offset %d\n", name, set, g, phase, t.k[tap],
                      group.base[t.plane[tap]] + t.step[tap] * t.source_step);
      }
}

}  // namespace

int main() {
  std::string op, layout;
  int product, sms;
  while (std::cin >> op >> product >> layout >> sms) {
    Params p{};
    Problem& q = p.problem;
    std::cin >> q.batch >> q.c_in >> q.c_out >> q.groups;
    for (Axis* a : {&q.h, &q.w})
      std::cin >> a->in >> a->out >> a->kernel >> a->stride >> a->dilation >> a->pad;
    const bool wgmma = product > kMma64;
    p.dtype = product == kMma64            ? Dtype::kFloat64
              : product == kMma16 || wgmma ? Dtype::kBFloat16
                                           : Dtype::kFloat32;
    contiguous(&p.x, q.c_in, q.h.in, q.w.in, layout == "channels_last");
    contiguous(&p.y, q.c_out, q.h.out, q.w.out, layout == "channels_last");
    contiguous(&p.w, q.c_out / q.groups, q.h.kernel, q.w.kernel, false);
    const Device device{sms, kSharedBytes};
    const Op which = op == "forward"      ? Op::kForward
                     : op == "grad_input" ? Op::kGradInput
                                          : Op::kGradWeight;
    const auto print_axes = [](const auto& plan) {
      print_axis("h", plan.h);
      print_axis("w", plan.w);
    };
    const char* declined = wgmma ? decline_wgmma(which, p, 9, 0) : decline_gemm(which, p);
    if (declined) {
      std::printf("declined %s\nend\n", declined);
      continue;
    }
    try {
      if (wgmma && which == Op::kGradWeight) {
        const WgmmaWeightPlan plan = plan_wgmma_weight(p, "", device);
        std::printf(
            "plan %s blocks %lld shared %lld splits %d tiles %lld staged %d stages %d stage_bytes "
            "%d "
            "preferred %d\n",
            kWgmmaWeightTiles[plan.tile].name, static_cast<long long>(plan.blocks),
            static_cast<long long>(plan.shared_bytes), plan.splits,
            static_cast<long long>(plan.tiling.tiles()), plan.staged.pixels, plan.stages,
            plan.stage_bytes, prefer_wgmma(which, p));
        print_axes(plan);
      } else if (wgmma) {
        const WgmmaPlan plan = plan_wgmma(which, p, "", device);
        std::printf(
            "plan %s blocks %lld shared %lld chunk %d tiles %lld staged %d buffers %d stages %d "
            "preferred %d\n",
            kWgmmaTiles[plan.tile].name, static_cast<long long>(plan.blocks),
            static_cast<long long>(plan.shared_bytes), 1 << plan.log_chunk,
            static_cast<long long>(plan.tiles()), plan.staged.pixels, plan.source_buffers,
            plan.weight_stages, prefer_wgmma(which, p));
        print_axes(plan);
      } else if (which == Op::kGradWeight) {
        const WeightPlan plan = plan_weight(p, static_cast<Product>(product), "", device);
        std::printf(
            "plan %s blocks %lld shared %lld splits %d tiles %lld staged %d sets %d parts %d\n",
            kWeightTiles[plan.tile].name, static_cast<long long>(plan.blocks),
            static_cast<long long>(plan.shared_bytes), plan.splits,
            static_cast<long long>(plan.tiling.tiles()), plan.staged.pixels, plan.tap_sets,
            plan.groups_h * plan.groups_w);
        print_axes(plan);
      } else {
        const GatherPlan plan = plan_gather(which, p, static_cast<Product>(product), "", device);
        std::printf(
            "plan %s blocks %lld shared %lld chunk %d tiles %lld staged %d buffers %d splits %d\n",
            kGatherTiles[plan.tile].name, static_cast<long long>(plan.blocks),
            static_cast<long long>(plan.shared_bytes), 1 << plan.log_chunk,
            static_cast<long long>(plan.tiling.tiles()), plan.staged.pixels, plan.source_buffers,
            plan.splits);
        print_axes(plan);
      }
    } catch (const std::invalid_argument& error) {
      std::printf("declined %s\n", error.what());
    }
    std::printf("end\n");
  }
}
