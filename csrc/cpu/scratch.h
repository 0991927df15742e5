// Working memory that is kept between calls, so that only the first one pays its page faults.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deconv {
namespace cpu {

// Both are 64-byte aligned, throw std::bad_alloc and stay valid until the same thread asks again:
// `thread_scratch` for one task, `call_scratch` for what the threads of a call share.
void* thread_scratch(std::size_t bytes);
void* call_scratch(std::size_t bytes);

// Hands out consecutive 64-byte aligned pieces of a block; with a null block it only counts.
class Carver {
 public:
  explicit Carver(void* block) : block_(static_cast<char*>(block)) {}

  template <class T>
  T* take(int64_t count) {
    char* piece = block_ + used_;
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }
  std::size_t used() const { return used_; }

 private:
  char* block_;
  std::size_t used_ = 0;
};

}  // namespace cpu
}  // namespace deconv
