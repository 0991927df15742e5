// What threads and warps ask of the hardware by name: vector accesses, asynchronous copies,
// shuffles, ldmatrix and mma.
//
// The layouts of matrix fragments are those of the PTX ISA, section "Warp-level matrix
// instructions": "Matrix fragments for mma.m16n8k16 with floating point type", "... mma.m16n8k8",
// "... mma.m8n8k4 with .f64", and "ldmatrix". They are written as functions from (lane, element) to
// (row, column), as the manual gives them.
#include <cstring>
#include <map>

#include "../../csrc/half.h"
#include "cuda_runtime_api.h"
#include "machine.h"

#define SITE __builtin_return_address(0)

namespace emulation {
namespace {

Thread& current() { return machine.threads[static_cast<size_t>(machine.thread)]; }

int first_lane() { return machine.thread / kWarp * kWarp; }

bool on_stack(const void* address) {
  const char* p = static_cast<const char*>(address);
  return p >= machine.stack && p < machine.stack + kStackBytes;
}

void require_full(unsigned mask, Site site) {
  if (mask != ~0u) fail(machine.thread, site, "the mask of a collective is %u, not full", mask);
}

}  // namespace

void* shared_memory() { return machine.shared; }

void load(void* to, const void* from, size_t bytes) {
  if (!on_stack(from)) check(machine.thread, SITE, from, bytes, Access::kRead, bytes);
  std::memcpy(to, from, bytes);
}

void store(void* to, const void* from, size_t bytes) {
  if (!on_stack(to)) check(machine.thread, SITE, to, bytes, Access::kWrite, bytes);
  std::memcpy(to, from, bytes);
}

// ---- warps --------------------------------------------------------------------------------------

void sync_warp(unsigned mask) {
  require_full(mask, SITE);
  collective(
      SITE,
      [](void* const*) {
        ++machine.warp_epoch[static_cast<size_t>(machine.thread / kWarp)];
        meet(first_lane(), kWarp);
      },
      nullptr);
}

void shuffle(unsigned mask, void* value, size_t bytes, int from_lane) {
  struct Operands {
    void* value;
    size_t bytes;
    int from;
    unsigned char before[16];
  } mine{value, bytes, from_lane, {}};
  require_full(mask, SITE);
  if (bytes > sizeof(mine.before)) fail(machine.thread, SITE, "shuffles %zu bytes", bytes);
  std::memcpy(mine.before, value, bytes);
  collective(
      SITE,
      [](void* const* lanes) {
        for (int lane = 0; lane < kWarp; ++lane) {
          const auto& to = *static_cast<Operands*>(lanes[lane]);
          std::memcpy(to.value, static_cast<Operands*>(lanes[to.from])->before, to.bytes);
        }
      },
      &mine);
}

unsigned ballot(unsigned mask, bool predicate) {
  struct Operands {
    bool predicate;
    unsigned result;
  } mine{predicate, 0};
  require_full(mask, SITE);
  collective(
      SITE,
      [](void* const* lanes) {
        unsigned votes = 0;
        for (int lane = 0; lane < kWarp; ++lane)
          votes |= unsigned{static_cast<Operands*>(lanes[lane])->predicate} << lane;
        for (int lane = 0; lane < kWarp; ++lane)
          static_cast<Operands*>(lanes[lane])->result = votes;
      },
      &mine);
  return mine.result;
}

// ---- asynchronous copies: issued now, arriving at the wait, never sooner ------------------------

void copy_async(void* s_to, const void* from, int bytes, int valid_bytes) {
  const size_t size = static_cast<size_t>(bytes);
  if (valid_bytes < 0 || valid_bytes > bytes)
    fail(machine.thread, SITE, "copies %d of %d bytes", valid_bytes, bytes);
  if (reinterpret_cast<uintptr_t>(from) % size || reinterpret_cast<uintptr_t>(s_to) % size)
    fail(machine.thread, SITE, "misaligned: copies %d bytes", bytes);
  if (valid_bytes)
    check(machine.thread, SITE, from, static_cast<size_t>(valid_bytes), Access::kRead, 1);
  check_copy_issued(machine.thread, SITE, s_to, size);
  Copy copy{static_cast<unsigned char*>(s_to), {}, bytes};
  std::memcpy(copy.data, from, static_cast<size_t>(valid_bytes));
  current().uncommitted.push_back(copy);
}

void copy_async_commit() {
  current().groups.push_back(std::move(current().uncommitted));
  current().uncommitted.clear();
}

void copy_async_wait(int groups) {
  auto& flying = current().groups;
  while (flying.size() > static_cast<size_t>(groups)) {
    for (const Copy& copy : flying.front()) {
      std::memcpy(copy.to, copy.data, static_cast<size_t>(copy.bytes));
      check_copy_arrived(machine.thread, SITE, copy.to, static_cast<size_t>(copy.bytes));
    }
    flying.erase(flying.begin());
  }
}

// ---- ldmatrix -----------------------------------------------------------------------------------

void ldmatrix(uint32_t* r, const void* s_row, int matrices, bool transposed) {
  struct Operands {
    uint32_t* r;
    const void* row;
    int matrices;
    bool transposed;
    Site site;
  } mine{r, s_row, matrices, transposed, SITE};
  collective(
      SITE,
      [](void* const* lanes) {
        const auto of = [lanes](int lane) -> Operands& {
          return *static_cast<Operands*>(lanes[lane]);
        };
        for (int lane = 1; lane < kWarp; ++lane)
          if (of(lane).matrices != of(0).matrices || of(lane).transposed != of(0).transposed)
            fail(machine.thread, of(lane).site, "loads other matrices than lane 0 of its warp");
        for (int m = 0; m < of(0).matrices; ++m) {
          uint16_t matrix[8][8];
          for (int row = 0; row < 8; ++row) {
            const int lane = 8 * m + row;
            check(first_lane() + lane, of(lane).site, of(lane).row, 16, Access::kRead, 16);
            std::memcpy(matrix[row], of(lane).row, 16);
          }
          for (int lane = 0; lane < kWarp; ++lane) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
              const int row = lane / 4, column = lane % 4 * 2 + i;
              pair[i] = of(lane).transposed ? matrix[column][row] : matrix[row][column];
            }
            std::memcpy(&of(lane).r[m], pair, 4);
          }
        }
      },
      &mine);
}

// ---- mma ----------------------------------------------------------------------------------------

namespace {

struct Fragments {
  void* c;
  const void* a;
  const void* b;
};

// C += A B for one warp. Elements i of a lane's fragments are A[a_row][a_column] and so on; A is
// [rows][depth], B is [depth][8], with as many elements a lane as that takes.
template <class Element, class Sum, int rows, int depth, class Layout>
void multiply(void* const* lanes) {
  Sum a[rows][depth], b[depth][8], c[rows][8];
  const auto for_sums = [&](const auto& visit) {  // each of a lane, and where it lies in C
    for (int lane = 0; lane < kWarp; ++lane)
      for (int i = 0; i < rows * 8 / kWarp; ++i)
        visit(static_cast<Sum*>(static_cast<const Fragments*>(lanes[lane])->c)[i],
              c[lane / 4 + 8 * (i / 2)][lane % 4 * 2 + i % 2]);
  };
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& f = *static_cast<const Fragments*>(lanes[lane]);
    const Element* fa = static_cast<const Element*>(f.a);
    const Element* fb = static_cast<const Element*>(f.b);
    for (int i = 0; i < rows * depth / kWarp; ++i)
      a[Layout::a_row(lane, i)][Layout::a_column(lane, i)] = Layout::value(fa[i]);
    for (int i = 0; i < depth * 8 / kWarp; ++i)
      b[Layout::b_row(lane, i)][lane / 4] = Layout::value(fb[i]);
  }
  for_sums([](const Sum& of_lane, Sum& sum) { sum = of_lane; });
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for_sums([](Sum& of_lane, const Sum& sum) { of_lane = sum; });
}

// m16n8k16: a0..a7 and b0..b3 of 16 bits.
template <class T>
struct Layout16 {
  static int a_row(int lane, int i) { return lane / 4 + (i / 2 % 2 ? 8 : 0); }
  static int a_column(int lane, int i) { return lane % 4 * 2 + i % 2 + (i >= 4 ? 8 : 0); }
  static int b_row(int lane, int i) { return lane % 4 * 2 + i % 2 + (i >= 2 ? 8 : 0); }
  static float value(T v) { return deconv::to_float(v); }
};

// m16n8k8: a0..a3 and b0..b1 of 32 bits, whose low 13 the hardware does not see.
struct LayoutTf32 {
  static int a_row(int lane, int i) { return lane / 4 + (i % 2 ? 8 : 0); }
  static int a_column(int lane, int i) { return lane % 4 + (i >= 2 ? 4 : 0); }
  static int b_row(int lane, int i) { return lane % 4 + (i ? 4 : 0); }
  static float value(uint32_t v) { return deconv::bit_cast<float>(v & ~0x1fffu); }
};

// m8n8k4: one a and one b of 64 bits.
struct Layout64 {
  static int a_row(int lane, int) { return lane / 4; }
  static int a_column(int lane, int) { return lane % 4; }
  static int b_row(int lane, int) { return lane % 4; }
  static double value(double v) { return v; }
};

}  // namespace

template <class T>
void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b) {
  Fragments mine{c, a, b};
  collective(SITE, multiply<T, float, 16, 16, Layout16<T>>, &mine);
}
template void mma_16x8x16<deconv::Float16>(float*, const uint32_t*, const uint32_t*);
template void mma_16x8x16<deconv::BFloat16>(float*, const uint32_t*, const uint32_t*);

void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b) {
  Fragments mine{c, a, b};
  collective(SITE, multiply<uint32_t, float, 16, 8, LayoutTf32>, &mine);
}

void mma_8x8x4(double* c, double a, double b) {
  Fragments mine{c, &a, &b};
  collective(SITE, multiply<double, double, 8, 4, Layout64>, &mine);
}

// ---- the device ---------------------------------------------------------------------------------

namespace {
// An H200's.
std::map<int, int> attributes = {{cudaDevAttrMultiProcessorCount, 132},
                                 {cudaDevAttrComputeCapabilityMajor, 9},
                                 {cudaDevAttrComputeCapabilityMinor, 0},
                                 {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 * 1024}};
}  // namespace

bool attribute(int* value, int which) {
  const auto found = attributes.find(which);
  if (found != attributes.end()) *value = found->second;
  return found != attributes.end();
}

void set_attribute(int which, int value) { attributes[which] = value; }

}  // namespace emulation
