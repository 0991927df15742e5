#include "scratch.h"

#include <cstdlib>
#include <new>

namespace deconv {
namespace cpu {
namespace {

class Block {
 public:
  ~Block() { std::free(data_); }

  void* at_least(std::size_t bytes) {
    if (bytes > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
      if (!data_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  std::size_t capacity_ = 0;
};

}  // namespace

void* thread_scratch(std::size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

void* call_scratch(std::size_t bytes) {
  thread_local Block block;
  return block.at_least(bytes);
}

}  // namespace cpu
}  // namespace deconv
