#include "scratch.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace deconv {
namespace cpu {
namespace {
struct Free {
  void operator()(void* p) const { std::free(p); }
};

void* aligned_block(std::size_t bytes) {
  void* block = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (!block) throw std::bad_alloc();
  return block;
}
}  // namespace

Buffer::Buffer(std::size_t bytes) : data_(aligned_block(bytes)) {}
Buffer::~Buffer() { std::free(data_); }

void* thread_scratch(std::size_t bytes) {
  thread_local std::unique_ptr<void, Free> block;
  thread_local std::size_t capacity = 0;
  if (bytes > capacity) {
    block.reset();
    capacity = 0;
    block.reset(aligned_block(bytes));
    capacity = bytes;
  }
  return block.get();
}

}  // namespace cpu
}  // namespace deconv
