// Working memory of one thread: kept between calls, so that only the first call pays its page faults. Valid until the same thread
// asks again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deconv {
namespace cpu {
void* thread_scratch(std::size_t bytes);  // 64-byte aligned; throws std::bad_alloc

// Memory of one call, shared by its threads.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

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
