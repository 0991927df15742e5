// What Python calls, through ctypes: the torch-free interface of csrc/deconv.h, and the machine.
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <vector>

#include "../../csrc/deconv.h"
#include "emulation.h"

namespace {

std::string text;  // of the last call, until the next

// Memory for a call, apart from everything else.
class Workspaces {
 public:
  explicit Workspaces(bool planned) : planned_(planned) {}

  void* operator()(size_t bytes) {
    if (planned_) return reinterpret_cast<void*>(uintptr_t{1} << 30);
    constexpr size_t kAlignment = 256;
    memory_.emplace_back(new char[bytes + 3 * kAlignment]);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(memory_.back().get()) + kAlignment;
    void* data = reinterpret_cast<void*>((begin + kAlignment - 1) / kAlignment * kAlignment);
    const std::string name = "workspace " + std::to_string(memory_.size());
    emulation::add_tensor(data, bytes, emulation::Kind::kWorkspace, name.c_str());
    return data;
  }

 private:
  bool planned_;  // nobody will touch it
  std::vector<std::unique_ptr<char[]>> memory_;
};

// 0 if it went well, 1 where the problem was declined, 2 for a mistake of a kernel.
template <class Function>
int guarded(const Function& function) {
  text.clear();
  try {
    function();
    return 0;
  } catch (const std::invalid_argument& error) {
    text = error.what();
    return 1;
  } catch (const std::exception& error) {
    text = error.what();
    return 2;
  }
}

}  // namespace

extern "C" {

const char* emulation_text() { return text.c_str(); }

void emulation_seed(uint64_t value) { emulation::seed(value); }

void emulation_add_tensor(void* data, size_t bytes, int kind, const char* name) {
  emulation::add_tensor(data, bytes, static_cast<emulation::Kind>(kind), name);
}

void emulation_remove_tensors() { emulation::remove_tensors(); }

void emulation_set_attribute(int which, int value) { emulation::set_attribute(which, value); }

void emulation_count(int enabled) { emulation::count(enabled != 0); }

const char* emulation_counts() {
  text = emulation::counts();
  return text.c_str();
}

// The launches of a call, which are not run.
const char* emulation_plan(int op, const deconv::Params* params, const char* algorithm,
                           int allow_tf32, int* status) {
  emulation::plan(true);
  *status = guarded([&] {
    Workspaces workspaces(true);
    const deconv::cuda::Context context{nullptr, std::ref(workspaces), allow_tf32 != 0};
    deconv::cuda::run(static_cast<deconv::Op>(op), *params, algorithm, context);
  });
  if (*status == 0) text = emulation::planned_launches();
  emulation::plan(false);
  return text.c_str();
}

int emulation_run(int op, const deconv::Params* params, const char* algorithm, int allow_tf32) {
  return guarded([&] {
    Workspaces workspaces(false);
    const deconv::cuda::Context context{nullptr, std::ref(workspaces), allow_tf32 != 0};
    deconv::cuda::run(static_cast<deconv::Op>(op), *params, algorithm, context);
  });
}

int emulation_grad_bias(const deconv::GradBiasParams* params) {
  return guarded([&] {
    Workspaces workspaces(false);
    deconv::cuda::grad_bias(*params, {nullptr, std::ref(workspaces), false});
  });
}

const char* emulation_algorithms(int op) {
  text.clear();
  for (const std::string& name : deconv::cuda::algorithms(static_cast<deconv::Op>(op)))
    text += (text.empty() ? "" : " ") + name;
  return text.c_str();
}

}  // extern "C"
