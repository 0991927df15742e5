// What goes on beside the threads on sm_90a: mbarriers, the copy engine (cp.async.bulk) and
// products of a warpgroup (wgmma).
//
// Written from the PTX ISA: "Parallel Synchronization and Communication Instructions: mbarrier",
// "Data Movement and Conversion Instructions: cp.async.bulk", "Asynchronous Warpgroup Level Matrix
// Multiply-Accumulate Instructions" with its sections "Async Proxy", "Shared Memory Matrix Layout",
// "Strides", "Matrix Descriptor Format" and "wgmma.fence". Of the descriptor this file knows what
// these say and not how csrc/cuda/ptx_sm90a.cuh makes one.
#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "../../csrc/half.h"
#include "cuda_runtime_api.h"
#include "machine.h"

#define SITE __builtin_return_address(0)
#define FAST __attribute__((optimize("O3"), target_clones("avx2", "default")))

namespace emulation {

Clocks clocks;

namespace {

constexpr int kWarpgroup = 128;
// Where dynamic shared memory begins in the window of shared addresses: not at zero.
constexpr uint32_t kWindow = 1024;

struct Mbarrier {
  size_t at;        // in shared memory
  int number;       // as an actor
  int initialiser;  // the thread
  uint32_t time;    // and when
  int arrivals, pending;
  int64_t bytes = 0;      // expected less arrived
  uint32_t phase = 0;     // completed so far
  Site copied = nullptr;  // from where bytes were copied that nobody has waited for since
  std::vector<uint32_t> seen, fenced;            // of those who arrived, this phase
  std::vector<uint32_t> last_seen, last_fenced;  // of the last phase
};

struct BulkCopy {
  unsigned char* to;
  std::vector<unsigned char> data;
  Mbarrier* barrier;
  int thread;
  Site site;
};

struct Awaited {
  Mbarrier* barrier;
  unsigned parity;
};

struct ProductReads {
  int group;
  std::vector<size_t> at;
};

std::map<size_t, Mbarrier> mbarriers;
std::vector<BulkCopy> copies;
std::map<int, Awaited> waiting;                     // by thread
std::map<int, std::vector<ProductReads>> products;  // by warp, in flight

Thread& current() { return machine.threads[static_cast<size_t>(machine.thread)]; }

void start_clocks() {
  if (clocks.on) return;
  clocks.on = true;
  ++clocks.changes;
  clocks.actors = machine.threads.size() + kMaxMbarriers;
  clocks.seen.assign(machine.threads.size() * clocks.actors, 0);
  clocks.fenced = clocks.seen;
  start_reads();
  // Before, barriers of the whole block were all the order there was.
  if (machine.epoch) meet(0, static_cast<int>(machine.threads.size()));
}

FAST void join(uint32_t* to, const uint32_t* from) {
  for (size_t i = 0; i < clocks.actors; ++i) to[i] = to[i] < from[i] ? from[i] : to[i];
}

FAST void bound(uint32_t* to, const uint32_t* from) {
  for (size_t i = 0; i < clocks.actors; ++i) to[i] = to[i] < from[i] ? to[i] : from[i];
}

Mbarrier& mbarrier_of(Site site, void* s_barrier) {
  const auto found =
      in_shared(s_barrier, 8) ? mbarriers.find(shared_offset(s_barrier)) : mbarriers.end();
  if (found == mbarriers.end())
    fail(machine.thread, site, "uses an mbarrier that is not initialised");
  Mbarrier& barrier = found->second;
  if (machine.thread != barrier.initialiser &&
      clocks.seen_by(machine.thread)[barrier.initialiser] <= barrier.time)
    fail(machine.thread, site, "race: uses an mbarrier that thread %d has initialised",
         barrier.initialiser);
  return barrier;
}

// The phase that thread waits for is over: what those who arrived had seen, it has seen.
void acquire(int thread, Mbarrier& barrier) {
  barrier.copied = nullptr;
  ++clocks.changes;
  join(clocks.seen_by(thread), barrier.last_seen.data());
  join(clocks.fenced_by(thread), barrier.last_fenced.data());
}

bool completed(const Mbarrier& barrier, unsigned parity) { return (barrier.phase & 1) != parity; }

void complete_if_due(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  ++clocks.time;
  const size_t engine = machine.threads.size() + static_cast<size_t>(barrier.number);
  barrier.seen[engine] = clocks.time;
  barrier.last_seen = barrier.seen;
  barrier.last_fenced = barrier.fenced;
  std::fill(barrier.seen.begin(), barrier.seen.end(), 0);
  std::fill(barrier.fenced.begin(), barrier.fenced.end(), 0);
  barrier.pending = barrier.arrivals;
  ++barrier.phase;
  for (auto it = waiting.begin(); it != waiting.end();) {
    if (it->second.barrier == &barrier && completed(barrier, it->second.parity)) {
      machine.threads[static_cast<size_t>(it->first)].state = State::kReady;
      it = waiting.erase(it);
    } else {
      ++it;
    }
  }
}

void arrive(BulkCopy& copy) {
  std::memcpy(copy.to, copy.data.data(), copy.data.size());
  check_bulk_arrived(copy.to, copy.data.size(), copy.barrier->number);
  copy.barrier->copied = copy.site;
  copy.barrier->bytes -= static_cast<int64_t>(copy.data.size());
  complete_if_due(*copy.barrier);
}

}  // namespace

uint32_t shared_address(const void* pointer) {
  if (!in_shared(pointer, 1))
    fail(machine.thread, SITE, "takes a shared address of something else");
  return kWindow + static_cast<uint32_t>(shared_offset(pointer));
}

void reset_asynchronous() {
  clocks.on = false;
  clocks.time = 0;
  mbarriers.clear();
  copies.clear();
  waiting.clear();
  products.clear();
}

void meet(int first, int count) {
  if (!clocks.on) return;
  ++clocks.time;
  ++clocks.changes;
  std::vector<uint32_t> seen(clocks.actors, 0), fenced(clocks.actors, 0);
  for (int t = first; t < first + count; ++t) {
    join(seen.data(), clocks.seen_by(t));
    join(fenced.data(), clocks.fenced_by(t));
  }
  for (int t = first; t < first + count; ++t) seen[static_cast<size_t>(t)] = clocks.time;
  for (int t = first; t < first + count; ++t) {
    std::copy(seen.begin(), seen.end(), clocks.seen_by(t));
    std::copy(fenced.begin(), fenced.end(), clocks.fenced_by(t));
  }
}

// ---- mbarriers ----------------------------------------------------------------------------------

void mbarrier_init(void* s_barrier, int arrivals) {
  start_clocks();
  check(machine.thread, SITE, s_barrier, 8, Access::kWrite, 8);
  const size_t at = shared_offset(s_barrier);
  if (arrivals < 1 || arrivals >= 1 << 20)
    fail(machine.thread, SITE, "initialises an mbarrier for %d arrivals", arrivals);
  if (mbarriers.count(at) || mbarriers.size() == kMaxMbarriers)
    fail(machine.thread, SITE, "initialises an mbarrier twice, or more of them than there are");
  Mbarrier& barrier = mbarriers[at];
  barrier.at = at;
  barrier.number = static_cast<int>(mbarriers.size()) - 1;
  barrier.initialiser = machine.thread;
  barrier.time = clocks.time;
  barrier.arrivals = barrier.pending = arrivals;
  barrier.seen.assign(clocks.actors, 0);
  barrier.fenced = barrier.last_seen = barrier.last_fenced = barrier.seen;
}

void mbarrier_arrive(void* s_barrier, int expected_bytes) {
  Mbarrier& barrier = mbarrier_of(SITE, s_barrier);
  if (barrier.pending == 0)
    fail(machine.thread, SITE, "arrives at an mbarrier where all %d arrivals of the phase were",
         barrier.arrivals);
  uint32_t* seen = clocks.seen_by(machine.thread);
  seen[machine.thread] = ++clocks.time;
  join(barrier.seen.data(), seen);
  join(barrier.fenced.data(), clocks.fenced_by(machine.thread));
  barrier.bytes += expected_bytes;
  --barrier.pending;
  complete_if_due(barrier);
}

void mbarrier_wait(void* s_barrier, unsigned parity) {
  Mbarrier& barrier = mbarrier_of(SITE, s_barrier);
  if (parity > 1) fail(machine.thread, SITE, "waits for the parity %u", parity);
  if (!completed(barrier, parity)) {
    current().state = State::kAtMbarrier;
    current().site = SITE;
    waiting[machine.thread] = {&barrier, parity};
    yield();
  }
  acquire(machine.thread, barrier);
}

std::string awaited(int thread) {
  const Mbarrier& barrier = *waiting.at(thread).barrier;
  return "waits for phase " + std::to_string(barrier.phase) + " of the mbarrier at byte " +
         std::to_string(barrier.at) + " of shared memory, which lacks " +
         std::to_string(barrier.pending) + " of " + std::to_string(barrier.arrivals) +
         " arrivals and " + std::to_string(barrier.bytes) + " bytes";
}

void fence_async_proxy() {
  start_clocks();
  ++clocks.changes;
  uint32_t* seen = clocks.seen_by(machine.thread);
  seen[machine.thread] = ++clocks.time;
  std::copy_n(seen, clocks.actors, clocks.fenced_by(machine.thread));
}

// ---- the copy engine ----------------------------------------------------------------------------

void copy_bulk(void* s_to, const void* from, int bytes, void* s_barrier) {
  Mbarrier& barrier = mbarrier_of(SITE, s_barrier);
  const size_t size = static_cast<size_t>(bytes);
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16 ||
      reinterpret_cast<uintptr_t>(s_to) % 16)
    fail(machine.thread, SITE, "misaligned: copies %d bytes", bytes);
  if (clocks.fenced_by(machine.thread)[barrier.initialiser] <= barrier.time)
    fail(machine.thread, SITE,
         "copies on an mbarrier that the copy engine need not see: it was initialised without a "
         "proxy fence since");
  check(machine.thread, SITE, from, size, Access::kRead, 16);
  check_bulk_issued(machine.thread, SITE, s_to, size);
  const unsigned char* data = static_cast<const unsigned char*>(from);
  copies.push_back(
      {static_cast<unsigned char*>(s_to), {data, data + size}, &barrier, machine.thread, SITE});
}

bool copies_arrive(bool one) {
  bool any = false;
  std::vector<BulkCopy> left;
  std::vector<BulkCopy> flying = std::move(copies);
  copies.clear();
  const size_t certain = flying.empty() || !one ? flying.size() : random_number() % flying.size();
  for (size_t i = 0; i < flying.size(); ++i) {
    if (i == certain || random_number() % 8 == 0) {
      arrive(flying[i]);
      any = true;
    } else {
      left.push_back(std::move(flying[i]));
    }
  }
  copies = std::move(left);
  return any;
}

void check_nothing_flies() {
  if (!copies.empty()) fail(copies[0].thread, copies[0].site, "copies bytes that nobody waits for");
  for (const auto& [at, barrier] : mbarriers)
    if (barrier.copied)
      fail(barrier.initialiser, barrier.copied, "copies bytes that nobody waits for");
}

// ---- products of a warpgroup --------------------------------------------------------------------

namespace {

// "Matrix Descriptor Format": addresses and offsets in units of 16 bytes.
struct Descriptor {
  uint32_t start, leading, stride;
  unsigned base_offset, swizzle;
  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3fff) * 16),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3fff) * 16),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3fff) * 16),
        base_offset(static_cast<unsigned>(bits >> 49 & 7)),
        swizzle(static_cast<unsigned>(bits >> 62)) {}

  // Where 8 elements of 16 bits lie: K = 8 * half and on of `row`, K-major. The atom of 8 rows is
  // 16 bytes wide without swizzle, where `leading` leads from one half of K to the other; 128, 64
  // and 32 with it, where the halves are neighbours and bits 4 to 6 of the address are exchanged
  // with bits 7 to 9. `stride` leads to the next 8 rows.
  uint32_t address(int row, int half) const {
    const uint32_t r = static_cast<uint32_t>(row), h = static_cast<uint32_t>(half);
    if (swizzle == 0) return start + r / 8 * stride + r % 8 * 16 + h * leading;
    const uint32_t width = 256u >> swizzle;
    const uint32_t plain = start + r / 8 * stride + r % 8 * width + h * 16;
    return plain ^ ((plain >> 7 & (width / 16 - 1)) << 4);
  }

  // Where 8 rows, from 8 * vector on, of the k-th element of K lie, MN-major without swizzle: a
  // core matrix is 8 elements of K by 16 bytes of rows; `stride` leads to the next rows, `leading`
  // to the other half of K.
  uint32_t transposed_address(int vector, int k) const {
    return start + static_cast<uint32_t>(vector) * stride + static_cast<uint32_t>(k / 8) * leading +
           static_cast<uint32_t>(k % 8) * 16;
  }
};

struct Product {
  float* sums;
  int columns;
  uint64_t a, b;
  bool transposed;
  Site site;
};

template <class T>
void read_matrix(const Descriptor& d, int rows, int lane0, const Product& p, const uint32_t* seen,
                 const uint32_t* fenced, std::vector<float>& to, std::vector<size_t> (&reads)[4],
                 bool is_a) {
  if (p.transposed && d.swizzle != 0)
    fail(lane0, p.site, "multiplies transposed matrices with a swizzle, which is not modelled");
  // `outer` and `inner` are row and half of K, or 8 rows and an element of K.
  for (int outer = 0; outer < (p.transposed ? rows / 8 : rows); ++outer)
    for (int inner = 0; inner < (p.transposed ? 16 : 2); ++inner) {
      const uint32_t address =
          p.transposed ? d.transposed_address(outer, inner) : d.address(outer, inner);
      const int row = p.transposed ? outer * 8 : outer;
      unsigned char* from = machine.shared + (static_cast<int64_t>(address) - kWindow);
      if (address < kWindow || !in_shared(from, 16))
        fail(lane0, p.site, "out of bounds: multiplies row %d of %s at byte %lld of shared memory",
             row, is_a ? "A" : "B", static_cast<long long>(address) - kWindow);
      // A warp multiplies its own 16 rows of A by all of B.
      const int warp = is_a ? row / 16 : 0, warps = is_a ? 1 : 4;
      check_product_reads(lane0 / kWarp + warp, warps, p.site, from, seen, fenced);
      for (int i = warp; i < warp + warps; ++i) reads[i].push_back(shared_offset(from));
      T values[8];
      std::memcpy(values, from, 16);
      for (int i = 0; i < 8; ++i)
        to[static_cast<size_t>(p.transposed ? (row + i) * 16 + inner : row * 16 + inner * 8 + i)] =
            deconv::to_float(values[i]);
    }
}

// b is [16][columns]
FAST void add_row(float* to, const float* a, const float* b, int columns) {
  for (int k = 0; k < 16; ++k)
    for (int n = 0; n < columns; ++n) to[n] += a[k] * b[k * columns + n];
}

template <class T>
void multiply(void* const* lanes) {
  const int lane0 = machine.thread / kWarpgroup * kWarpgroup;
  const auto of = [&](int lane) -> const Product& {
    return *static_cast<const Product*>(lanes[lane]);
  };
  const Product& p = of(0);
  for (int lane = 1; lane < kWarpgroup; ++lane)
    if (of(lane).a != p.a || of(lane).b != p.b || of(lane).columns != p.columns ||
        of(lane).transposed != p.transposed)
      fail(lane0 + lane, p.site, "multiplies other matrices than lane 0 of its warpgroup");
  // What all of its lanes have seen; nothing changes while it issues one product after another.
  static std::vector<uint32_t> seen, fenced;
  static std::pair<uint64_t, int> seen_at;
  const std::pair<uint64_t, int> now{clocks.changes, lane0};
  if (seen_at != now || seen.size() != clocks.actors) {
    seen_at = now;
    seen.assign(clocks.seen_by(lane0), clocks.seen_by(lane0) + clocks.actors);
    fenced.assign(clocks.fenced_by(lane0), clocks.fenced_by(lane0) + clocks.actors);
    for (int lane = 1; lane < kWarpgroup; ++lane) {
      bound(seen.data(), clocks.seen_by(lane0 + lane));
      bound(fenced.data(), clocks.fenced_by(lane0 + lane));
    }
  }
  const size_t columns = static_cast<size_t>(p.columns);
  std::vector<float> a(64 * 16), b(columns * 16), transposed(columns * 16), c(64 * columns);
  std::vector<size_t> reads[4];
  read_matrix<T>(Descriptor(p.a), 64, lane0, p, seen.data(), fenced.data(), a, reads, true);
  read_matrix<T>(Descriptor(p.b), p.columns, lane0, p, seen.data(), fenced.data(), b, reads, false);
  for (size_t n = 0; n < columns; ++n)
    for (size_t k = 0; k < 16; ++k) transposed[k * columns + n] = b[n * 16 + k];
  for (size_t row = 0; row < 64; ++row)
    add_row(&c[row * columns], &a[row * 16], transposed.data(), p.columns);
  for (int warp = 0; warp < 4; ++warp) {
    const int group = machine.threads[static_cast<size_t>(lane0 + warp * kWarp)].product_groups;
    products[lane0 / kWarp + warp].push_back({group, std::move(reads[warp])});
  }
  for (int lane = 0; lane < kWarpgroup; ++lane) {
    Thread& thread = machine.threads[static_cast<size_t>(lane0 + lane)];
    float* registers = of(lane).sums;
    auto pending = std::find_if(thread.sums.begin(), thread.sums.end(),
                                [&](const PendingSums& s) { return s.registers == registers; });
    if (pending == thread.sums.end()) {
      if (!thread.sums_fenced)
        fail(lane0 + lane, p.site, "multiplies without wgmma.fence since registers were in use");
      thread.sums.push_back({registers, 0, {registers, registers + columns / 2}});
      pending = thread.sums.end() - 1;
      std::memset(registers, 0xff, columns / 2 * sizeof(float));
    }
    pending->group = thread.product_groups;
    // "Matrix Fragments for wgmma.mma_async.m64nNk16": accumulator D.
    for (int i = 0; i < p.columns / 2; ++i) {
      const int row = lane / kWarp * 16 + lane % kWarp / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      pending->values[static_cast<size_t>(i)] +=
          c[static_cast<size_t>(row) * columns + static_cast<size_t>(column)];
    }
  }
}

}  // namespace

void wgmma_fence() {
  start_clocks();
  collective(
      SITE,
      [](void* const*) {
        const size_t first = static_cast<size_t>(machine.thread / kWarp * kWarp);
        for (size_t lane = 0; lane < kWarp; ++lane)
          machine.threads[first + lane].sums_fenced = true;
      },
      nullptr);
}

template <class T>
void wgmma(float* sums, int columns, uint64_t a, uint64_t b, bool transposed) {
  start_clocks();
  if (columns % 8 || columns < 8 || columns > 256)
    fail(machine.thread, SITE, "multiplies by %d columns", columns);
  Product mine{sums, columns, a, b, transposed, SITE};
  collective(SITE, multiply<T>, &mine, kWarpgroup);
}
template void wgmma<deconv::Float16>(float*, int, uint64_t, uint64_t, bool);
template void wgmma<deconv::BFloat16>(float*, int, uint64_t, uint64_t, bool);

void wgmma_commit() { ++current().product_groups; }

void wgmma_wait(int groups) {
  int left = groups;  // the same for all lanes
  collective(
      SITE,
      [](void* const* lanes) {
        const int warp = machine.thread / kWarp;
        const size_t first = static_cast<size_t>(warp) * kWarp;
        const int done = machine.threads[first].product_groups - *static_cast<int*>(lanes[0]);
        auto& reading = products[warp];
        for (const ProductReads& reads : reading)
          if (reads.group < done)
            for (size_t at : reads.at) product_has_read(warp, at);
        const auto read = [done](const ProductReads& r) { return r.group < done; };
        reading.erase(std::remove_if(reading.begin(), reading.end(), read), reading.end());
        for (size_t lane = first; lane < first + kWarp; ++lane) {
          Thread& thread = machine.threads[lane];
          for (const PendingSums& sums : thread.sums)
            if (sums.group < done)
              std::copy(sums.values.begin(), sums.values.end(), sums.registers);
          const auto over = [done](const PendingSums& s) { return s.group < done; };
          thread.sums.erase(std::remove_if(thread.sums.begin(), thread.sums.end(), over),
                            thread.sums.end());
          thread.sums_fenced = false;
        }
      },
      &left);
}

}  // namespace emulation
