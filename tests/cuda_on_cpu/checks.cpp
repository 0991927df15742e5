// Whether a thread may touch an address: the functions that the compiler calls before each access.
#include <algorithm>
#include <cstring>
#include <memory>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, bytes)
#define ASAN_UNPOISON_MEMORY_REGION(begin, bytes)
#endif

namespace emulation {
namespace {

// Nobody's bytes on either side of what kernels may touch; callers of add_tensor leave as many.
constexpr size_t kGap = 256;

constexpr int kNobody = -1, kSeveral = -2;

// Accesses are followed by pairs of bytes, the smallest elements of kernels.
constexpr size_t kPair = 2;

// Of a byte of global memory: who wrote it last.
struct GlobalByte {
  int launch = 0;  // 0: before any launch
  int64_t block = 0;
  int thread = 0;
  uint32_t epoch = 0;
  bool initialised = false;
};

struct Tensor {
  char* begin;
  size_t bytes;
  Kind kind;
  std::string name;
  std::vector<GlobalByte> shadow;  // none for an input
};

// Of a pair of bytes of shared memory: its last writer and readers, and when.
struct SharedPair {
  int16_t writer = kNobody, reader = kNobody, reader_warp = kNobody;
  bool initialised = false, in_flight = false;
  bool by_engine = false;   // written by the copy engine, else by the generic proxy
  uint32_t write_time = 0;  // of `Clocks`
  uint32_t write_epoch = 0, write_warp_epoch = 0, read_epoch = 0, read_warp_epoch = 0;
};

std::vector<std::unique_ptr<Tensor>> tensors;
std::vector<SharedPair> shared_shadow;  // [pair]

// Of 16 bytes of shared memory and a warp, in a block that uses `Clocks`: its reads since.
struct Reads {
  uint32_t lanes = 0, time = 0;  // of plain reads, the last of them
  uint32_t products = 0;         // that read it and are in flight
  uint32_t product_time = 0;     // when the last one was waited for
  bool product = false;
};
constexpr size_t kGranule = 16;
std::vector<Reads> shared_reads;  // [granule][warp]

Reads& reads_of(size_t at, size_t warp) {
  return shared_reads[at / kGranule * ((machine.threads.size() + kWarp - 1) / kWarp) + warp];
}
std::unique_ptr<unsigned char[]> shared_storage;
size_t shared_storage_bytes = ~size_t{0};

Tensor* last_found = nullptr;

Tensor* find(const void* address) {
  const char* p = static_cast<const char*>(address);
  const auto holds = [p](const Tensor* t) { return p >= t->begin && p < t->begin + t->bytes; };
  if (last_found && holds(last_found)) return last_found;
  for (const auto& tensor : tensors)
    if (holds(tensor.get())) return last_found = tensor.get();
  return nullptr;
}

const char* verb(Access access) { return access == Access::kRead ? "reads" : "writes"; }

// The nearest tensor, to say by how much an access misses it.
std::string nearest(const void* address) {
  const char* p = static_cast<const char*>(address);
  if (p >= reinterpret_cast<char*>(machine.shared) &&
      p < reinterpret_cast<char*>(machine.shared) + machine.shared_bytes + 4096)
    return std::to_string(p - reinterpret_cast<char*>(machine.shared)) + " bytes into the " +
           std::to_string(machine.shared_bytes) + " bytes of shared memory";
  std::string text = "far from every tensor";
  ptrdiff_t best = ptrdiff_t{1} << 20;
  for (const auto& t : tensors) {
    const ptrdiff_t at = p - t->begin;
    const ptrdiff_t distance = at < 0 ? -at : at - static_cast<ptrdiff_t>(t->bytes);
    if (distance >= best) continue;
    best = distance;
    text = "at byte " + std::to_string(at) + " of " + t->name + ", which has " +
           std::to_string(t->bytes);
  }
  return text;
}

// Under AddressSanitizer the compiler does not report plain accesses to us: what a plain store has
// initialised is not known then.
#ifdef __SANITIZE_ADDRESS__
constexpr bool kPlainAccessesSeen = false;
#else
constexpr bool kPlainAccessesSeen = true;
#endif

void check_global(int thread, Site site, Tensor& tensor, size_t at, size_t bytes, Access access) {
  if (access == Access::kWrite && tensor.kind == Kind::kInput)
    fail(thread, site, "writes to %s, an input", tensor.name.c_str());
  if (tensor.kind == Kind::kInput) return;
  GlobalByte* const first = tensor.shadow.data();
  for (GlobalByte* b = first + at / kPair * kPair; b < first + at + bytes; b += kPair) {
    if (kPlainAccessesSeen && access == Access::kRead && !b->initialised)
      fail(thread, site, "reads byte %zu of %s, which is uninitialised", at, tensor.name.c_str());
    const bool ordered =
        b->launch != machine.launch ||
        (b->block == machine.block && (b->thread == thread || b->epoch < machine.epoch));
    if (!ordered)
      fail(thread, site, "race: %s byte %zu of %s, which block %lld, thread %d has written",
           verb(access), at, tensor.name.c_str(), static_cast<long long>(b->block), b->thread);
    if (access == Access::kWrite) *b = {machine.launch, machine.block, thread, machine.epoch, true};
  }
}

// Whether what another thread did then comes before what `thread` does now: there was a block
// barrier since, or it is in the same warp and there was a warp barrier.
bool ordered_after(int thread, int other_warp, uint32_t epoch, uint32_t warp_epoch) {
  if (epoch < machine.epoch) return true;
  const int warp = thread / kWarp;
  return other_warp == warp && warp_epoch < machine.warp_epoch[static_cast<size_t>(warp)];
}

// That nobody may still read what is written, of threads that mbarriers order.
void check_reads(int thread, Site site, size_t at) {
  const uint32_t* seen = clocks.seen_by(thread);
  const size_t warps = (machine.threads.size() + kWarp - 1) / kWarp;
  for (size_t warp = 0; warp < warps; ++warp) {
    const Reads& reads = reads_of(at, warp);
    if (!reads.lanes && !reads.products && !reads.product) continue;
    if (reads.products)
      fail(thread, site, "writes byte %zu of shared memory, which a product of warp %zu reads", at,
           warp);
    uint32_t heard = 0;
    for (size_t lane = 0; lane < kWarp && warp * kWarp + lane < machine.threads.size(); ++lane) {
      const size_t reader = warp * kWarp + lane;
      heard = std::max(heard, seen[reader]);
      if ((reads.lanes >> lane & 1) && reader != static_cast<size_t>(thread) &&
          seen[reader] <= reads.time)
        fail(thread, site, "race: writes byte %zu of shared memory, which thread %zu has read", at,
             reader);
    }
    if (reads.product && static_cast<size_t>(thread) / kWarp != warp && heard <= reads.product_time)
      fail(thread, site, "race: writes byte %zu of shared memory, which warp %zu has multiplied",
           at, warp);
  }
}

void check_reads(int thread, Site site, size_t at, size_t bytes) {
  if (!clocks.on) return;
  for (size_t i = at / kGranule * kGranule; i < at + bytes; i += kGranule)
    check_reads(thread, site, i);
}

void note_reads(int thread, size_t at, size_t bytes) {
  if (!clocks.on) return;
  for (size_t i = at / kGranule * kGranule; i < at + bytes; i += kGranule) {
    Reads& reads = reads_of(i, static_cast<size_t>(thread / kWarp));
    reads.lanes |= 1u << thread % kWarp;
    reads.time = clocks.time;
  }
}

void check_not_read(int thread, Site site, const SharedPair& b, size_t at) {
  if (clocks.on) return;  // check_reads has
  if (b.reader == kNobody || b.reader == thread ||
      ordered_after(thread, b.reader_warp, b.read_epoch, b.read_warp_epoch))
    return;
  if (b.reader == kSeveral)
    fail(thread, site, "race: writes byte %zu of shared memory, which several threads have read",
         at);
  fail(thread, site, "race: writes byte %zu of shared memory, which thread %d has read", at,
       b.reader);
}

void check_not_written(int thread, Site site, const SharedPair& b, size_t at, Access access) {
  if (b.writer == kNobody || b.writer == thread ||
      ordered_after(thread, b.writer / kWarp, b.write_epoch, b.write_warp_epoch) ||
      (clocks.on && clocks.seen_by(thread)[b.writer] > b.write_time))
    return;
  if (b.by_engine)
    fail(thread, site,
         "race: %s byte %zu of shared memory, whose bulk copy this thread has not waited for",
         verb(access), at);
  fail(thread, site, "race: %s byte %zu of shared memory, which thread %d has written",
       verb(access), at, b.writer);
}

// Calls update(pair, byte) for the pairs of an access; neighbours of one history, as those of a
// vector mostly are, have one future.
template <class Update>
void for_pairs(size_t at, size_t bytes, const Update& update) {
  const size_t end = (at + bytes + kPair - 1) / kPair;
  for (size_t i = at / kPair; i < end;) {
    const SharedPair before = shared_shadow[i];
    update(shared_shadow[i], i * kPair);
    const SharedPair after = shared_shadow[i];
    for (++i; i < end && std::memcmp(&shared_shadow[i], &before, sizeof(before)) == 0; ++i)
      shared_shadow[i] = after;
  }
}

void check_shared(int thread, Site site, size_t at, size_t bytes, Access access) {
  if (access == Access::kWrite) check_reads(thread, site, at, bytes);
  if (access == Access::kRead) note_reads(thread, at, bytes);
  const int16_t warp = static_cast<int16_t>(thread / kWarp), me = static_cast<int16_t>(thread);
  const uint32_t warp_epoch = machine.warp_epoch[static_cast<size_t>(warp)];
  for_pairs(at, bytes, [&](SharedPair& b, size_t i) {
    if (b.in_flight)
      fail(thread, site, "%s byte %zu of shared memory, whose asynchronous copy is in flight",
           verb(access), i);
    check_not_written(thread, site, b, i, access);
    if (access == Access::kWrite) {
      check_not_read(thread, site, b, i);
      b.writer = me;
      b.by_engine = false;
      b.write_time = clocks.time;
      b.write_epoch = machine.epoch;
      b.write_warp_epoch = warp_epoch;
      b.initialised = true;
      b.reader = kNobody;
    } else {
      if (kPlainAccessesSeen && !b.initialised)
        fail(thread, site, "reads byte %zu of shared memory, which is uninitialised", i);
      const bool again = b.reader != kNobody && b.read_epoch == machine.epoch;
      b.reader = !again || b.reader == me ? me : static_cast<int16_t>(kSeveral);
      b.reader_warp = !again || b.reader_warp == warp ? warp : static_cast<int16_t>(kSeveral);
      b.read_epoch = machine.epoch;
      b.read_warp_epoch = warp_epoch;
    }
  });
}

bool in_shared(const void* address) {
  const unsigned char* p = static_cast<const unsigned char*>(address);
  return p >= machine.shared && p < machine.shared + machine.shared_bytes;
}

}  // namespace

size_t shared_offset(const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - machine.shared);
}

bool in_shared(const void* address, size_t bytes) {
  return in_shared(address) && shared_offset(address) + bytes <= machine.shared_bytes;
}

void add_tensor(void* data, size_t bytes, Kind kind, const char* name) {
  auto tensor = std::make_unique<Tensor>(Tensor{static_cast<char*>(data), bytes, kind, name, {}});
  if (kind != Kind::kInput) {
    tensor->shadow.resize(bytes);
    std::memset(data, 0xff, bytes);  // NaN in every format
  }
  tensors.push_back(std::move(tensor));
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) - kGap, kGap);
  ASAN_POISON_MEMORY_REGION(static_cast<char*>(data) + bytes, kGap);
}

void remove_tensors() {
  for (const auto& t : tensors) ASAN_UNPOISON_MEMORY_REGION(t->begin - kGap, t->bytes + 2 * kGap);
  tensors.clear();
  last_found = nullptr;
}

void fill(void* data, int value, size_t bytes) {
  if (bytes == 0 || machine.planning) return;
  Tensor* tensor = find(data);
  const size_t at = tensor ? static_cast<size_t>(static_cast<char*>(data) - tensor->begin) : 0;
  if (!tensor || tensor->kind == Kind::kInput || at + bytes > tensor->bytes)
    fail(-1, nullptr, "cudaMemsetAsync of %zu bytes %s", bytes, nearest(data).c_str());
  std::memset(data, value, bytes);
  for (size_t i = at; i < at + bytes; ++i) tensor->shadow[i] = {0, 0, 0, 0, true};
}

// Dynamic shared memory is 128-byte aligned, between gaps, and poisoned for every block.
void reset_shared() {
  if (shared_storage_bytes != machine.shared_bytes) {
    shared_storage.reset(new unsigned char[machine.shared_bytes + 2 * kGap + 128]);
    shared_storage_bytes = machine.shared_bytes;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared_storage.get()) + kGap;
    machine.shared = reinterpret_cast<unsigned char*>((begin + 127) & ~uintptr_t{127});
    ASAN_POISON_MEMORY_REGION(machine.shared - kGap, kGap);
    ASAN_POISON_MEMORY_REGION(machine.shared + machine.shared_bytes, kGap);
  }
  std::memset(machine.shared, 0xff, machine.shared_bytes);
  shared_shadow.assign((machine.shared_bytes + kPair - 1) / kPair, SharedPair{});
  shared_reads.clear();
}

void check(int thread, Site site, const void* address, size_t bytes, Access access,
           size_t aligned) {
  if (reinterpret_cast<uintptr_t>(address) % aligned != 0)
    fail(thread, site, "misaligned: %s %zu bytes %s", verb(access), bytes,
         nearest(address).c_str());
  if (in_shared(address)) {
    const size_t at = shared_offset(address);
    if (at + bytes > machine.shared_bytes)
      fail(thread, site, "out of bounds: %s %zu bytes %s", verb(access), bytes,
           nearest(address).c_str());
    check_shared(thread, site, at, bytes, access);
    if (machine.counting) count_access(thread, site, address, bytes, access, nullptr);
    return;
  }
  Tensor* tensor = find(address);
  const size_t at =
      tensor ? static_cast<size_t>(static_cast<const char*>(address) - tensor->begin) : 0;
  if (!tensor || at + bytes > tensor->bytes)
    fail(thread, site, "out of bounds: %s %zu bytes %s", verb(access), bytes,
         nearest(address).c_str());
  check_global(thread, site, *tensor, at, bytes, access);
  if (machine.counting) count_access(thread, site, address, bytes, access, tensor->name.c_str());
}

void check_copy_issued(int thread, Site site, void* to, size_t bytes) {
  if (!in_shared(to) || shared_offset(to) + bytes > machine.shared_bytes)
    fail(thread, site, "out of bounds: copies %zu bytes %s", bytes, nearest(to).c_str());
  check_reads(thread, site, shared_offset(to), bytes);
  for_pairs(shared_offset(to), bytes, [&](SharedPair& b, size_t i) {
    if (b.in_flight)
      fail(thread, site, "copies to byte %zu of shared memory, where another copy is in flight", i);
    check_not_written(thread, site, b, i, Access::kWrite);
    check_not_read(thread, site, b, i);
    b.in_flight = true;
    b.initialised = false;
  });
  std::memset(to, 0xff, bytes);
  if (machine.counting) count_access(thread, site, to, bytes, Access::kWrite, nullptr);
}

void check_copy_arrived(int thread, Site site, void* to, size_t bytes) {
  const size_t at = shared_offset(to);
  for_pairs(at, bytes, [](SharedPair& b, size_t) { b.in_flight = false; });
  check_shared(thread, site, at, bytes, Access::kWrite);
}

// ---- the asynchronous proxy ---------------------------------------------------------------------

void start_reads() {
  const size_t warps = (machine.threads.size() + kWarp - 1) / kWarp;
  shared_reads.assign((machine.shared_bytes + kGranule - 1) / kGranule * warps, Reads{});
}

void check_bulk_issued(int thread, Site site, void* to, size_t bytes) {
  for_pairs(shared_offset(to), bytes, [&](const SharedPair& b, size_t i) {
    if (b.writer != kNobody && !b.by_engine && clocks.fenced_by(thread)[b.writer] <= b.write_time)
      fail(thread, site, "copies to byte %zu of shared memory, written without a proxy fence since",
           i);
  });
  check_copy_issued(thread, site, to, bytes);
}

void check_bulk_arrived(void* to, size_t bytes, int barrier) {
  for_pairs(shared_offset(to), bytes, [&](SharedPair& b, size_t) {
    b.in_flight = false;
    b.initialised = true;
    b.by_engine = true;
    b.writer = static_cast<int16_t>(machine.threads.size() + static_cast<size_t>(barrier));
    b.reader = kNobody;
    b.write_time = clocks.time;
    b.write_epoch = machine.epoch;
  });
}

void check_product_reads(int warp, int warps, Site site, const void* from, const uint32_t* seen,
                         const uint32_t* fenced) {
  const size_t at = shared_offset(from);
  const int thread = warp * kWarp;
  for_pairs(at, kGranule, [&](const SharedPair& b, size_t i) {
    if (b.in_flight)
      fail(thread, site,
           "multiplies byte %zu of shared memory, whose asynchronous copy is in flight", i);
    if (!b.initialised && kPlainAccessesSeen)
      fail(thread, site, "multiplies byte %zu of shared memory, which is uninitialised", i);
    if (b.writer == kNobody) return;
    if (seen[b.writer] <= b.write_time && b.by_engine)
      fail(thread, site,
           "race: multiplies byte %zu of shared memory, whose bulk copy this warpgroup has not "
           "waited for",
           i);
    // A thread always sees what it wrote itself, so a fence of its own is all that is missing then.
    if (!b.by_engine && fenced[b.writer] <= b.write_time)
      fail(thread, site,
           "multiplies byte %zu of shared memory, which thread %d has written, without a barrier "
           "and a proxy fence in between",
           i, b.writer);
  });
  for (int i = warp; i < warp + warps; ++i) ++reads_of(at, static_cast<size_t>(i)).products;
}

void product_has_read(int warp, size_t at) {
  Reads& reads = reads_of(at, static_cast<size_t>(warp));
  --reads.products;
  reads.product = true;
  reads.product_time = clocks.time;
}

}  // namespace emulation

// ---- what the compiler calls before every access (-fsanitize=thread) ----------------------------

namespace {

using emulation::Access;
using emulation::machine;

inline void plain(const void* address, size_t bytes, Access access, size_t aligned,
                  emulation::Site site) {
  if (!machine.on_thread) return;
  const char* p = static_cast<const char*>(address);
  if (p >= machine.stack && p < machine.stack + emulation::kStackBytes) {
    for (const auto& sums : machine.threads[static_cast<size_t>(machine.thread)].sums)
      if (p >= reinterpret_cast<const char*>(sums.registers) &&
          p < reinterpret_cast<const char*>(sums.registers + sums.values.size()))
        emulation::fail(machine.thread, site, "%s sums of a product that it has not waited for",
                        access == Access::kRead ? "reads" : "writes");
    return;
  }
  if (bytes) emulation::check(machine.thread, site, address, bytes, access, aligned);
}

}  // namespace

#define SITE __builtin_return_address(0)
#define HOOKS(bytes)                                                                      \
  void __tsan_read##bytes(void* p) { plain(p, bytes, Access::kRead, bytes, SITE); }       \
  void __tsan_write##bytes(void* p) { plain(p, bytes, Access::kWrite, bytes, SITE); }     \
  void __tsan_unaligned_read##bytes(void* p) { plain(p, bytes, Access::kRead, 1, SITE); } \
  void __tsan_unaligned_write##bytes(void* p) { plain(p, bytes, Access::kWrite, 1, SITE); }

extern "C" {
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
void __tsan_read_range(void* p, size_t bytes) { plain(p, bytes, Access::kRead, 1, SITE); }
void __tsan_write_range(void* p, size_t bytes) { plain(p, bytes, Access::kWrite, 1, SITE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
// Host code alone uses atomics: guards of static variables, reference counts.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_load(const volatile int* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
int __tsan_atomic32_fetch_add(volatile int* p, int value, int) {
  return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);
}
}
