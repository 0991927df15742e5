// Memory of large results, kept when a result dies and given to the next one that fits.
//
// Memory fresh from the system costs a page fault for every page that the kernel writes first,
// which may take longer than the kernel itself, and whether malloc hands out fresh memory for a
// block of megabytes depends on the history of the heap. docs/tuning.md has the measurements.
#pragma once

#include <cstddef>
#include <cstdint>

namespace deconv {
namespace cpu {

// Results below this size come from malloc, which recycles them by itself.
constexpr std::size_t kPooledBytes = std::size_t{1} << 20;

struct OutputBlock {
  void* data;  // aligned to 4096 bytes at least
  std::size_t capacity;
};

// Whether a result is so large that it will not be found in a cache again: what writes whole lines,
// one after another, then writes them past the caches, for they need not be read before.
// From `DECONV_EXT_STREAM_MB` MiB on, default 16.
bool outgrows_caches(std::int64_t bytes);
std::int64_t streamed_from();  // bytes
void set_streamed_from(std::int64_t bytes);

// Throws std::bad_alloc. Both may be called from any thread.
OutputBlock* acquire_output(std::size_t bytes);
void release_output(OutputBlock* block);

// Idle blocks hold at most `DECONV_EXT_POOL_MB` MiB (default 256; 0 keeps nothing), the longest
// unused ones going back to the system first.
std::size_t idle_output_bytes();
void empty_output_pool();

}  // namespace cpu
}  // namespace deconv
