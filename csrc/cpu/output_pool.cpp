#include "output_pool.h"

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace deconv {
namespace cpu {
namespace {

constexpr std::size_t kMiB = std::size_t{1} << 20;
constexpr std::size_t kHugePage = 2 * kMiB;
// Sizes are rounded up to this, so that nearly equal results can follow each other.
constexpr std::size_t kGrain = kMiB / 4;

std::size_t bytes_from(const char* variable, std::size_t default_mib) {
  const char* text = std::getenv(variable);
  return (text && *text ? std::strtoull(text, nullptr, 10) : default_mib) * kMiB;
}

std::atomic<std::int64_t>& least_streamed() {
  static std::atomic<std::int64_t> bytes(
      static_cast<std::int64_t>(bytes_from("DECONV_EXT_STREAM_MB", 16)));
  return bytes;
}

OutputBlock* allocate(std::size_t capacity) {
  auto block = std::make_unique<OutputBlock>();
  const bool huge = capacity >= kHugePage;
  if (posix_memalign(&block->data, huge ? kHugePage : 4096, capacity)) throw std::bad_alloc();
  block->capacity = capacity;
#ifdef MADV_HUGEPAGE
  // One fault for 2 MiB instead of 512. Only a hint: the result does not matter.
  if (huge) madvise(block->data, capacity / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return block.release();
}

void deallocate(OutputBlock* block) {
  std::free(block->data);
  delete block;
}

class Pool {
 public:
  OutputBlock* take(std::size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Not more than an eighth larger than needed; of these the last one used.
    for (std::size_t i = idle_.size(); i-- > 0;) {
      OutputBlock* block = idle_[i];
      if (block->capacity < capacity || block->capacity > capacity + capacity / 8) continue;
      idle_.erase(idle_.begin() + static_cast<std::ptrdiff_t>(i));
      bytes_ -= block->capacity;
      return block;
    }
    return nullptr;
  }

  void put(OutputBlock* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    idle_.push_back(block);
    bytes_ += block->capacity;
    shrink(most_);
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    shrink(0);
  }

  std::size_t bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return bytes_;
  }

  std::mutex& mutex() { return mutex_; }

 private:
  void shrink(std::size_t most) {
    std::size_t gone = 0;
    for (; bytes_ > most; ++gone) {
      bytes_ -= idle_[gone]->capacity;
      deallocate(idle_[gone]);
    }
    idle_.erase(idle_.begin(), idle_.begin() + static_cast<std::ptrdiff_t>(gone));
  }

  std::mutex mutex_;
  std::vector<OutputBlock*> idle_;  // the longest unused first
  std::size_t bytes_ = 0;           // of idle_
  const std::size_t most_ = bytes_from("DECONV_EXT_POOL_MB", 256);
};

// Never destroyed: results may live longer than any static object. A child process must not inherit
// a mutex that some other thread held.
Pool& pool() {
  static Pool* pool = [] {
    static Pool* made = new Pool;
    pthread_atfork([] { made->mutex().lock(); }, [] { made->mutex().unlock(); },
                   [] { made->mutex().unlock(); });
    return made;
  }();
  return *pool;
}

}  // namespace

bool outgrows_caches(std::int64_t bytes) { return bytes >= least_streamed(); }

std::int64_t streamed_from() { return least_streamed(); }

void set_streamed_from(std::int64_t bytes) { least_streamed() = bytes; }

OutputBlock* acquire_output(std::size_t bytes) {
  const std::size_t capacity = (bytes + kGrain - 1) / kGrain * kGrain;
  OutputBlock* block = pool().take(capacity);
  return block ? block : allocate(capacity);
}

void release_output(OutputBlock* block) { pool().put(block); }

std::size_t idle_output_bytes() { return pool().bytes(); }

void empty_output_pool() { pool().empty(); }

}  // namespace cpu
}  // namespace deconv
