// A heap whose every block ends, or begins, at a page that must not be touched: preloaded, it turns an access outside of a block
// into a crash. Off until guard() is called, so that only what a test calls pays for it. No address is used twice: an access to
// freed memory crashes too.
//
// A block that must be aligned cannot always end at the page. The bytes around it are filled, and compared when it is freed, which
// finds writes there. A fresh block is filled with the same 0xff, a NaN in every floating-point format: nobody finds zeros by luck.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { kPage = 4096, kFill = 0xff };
static const size_t kArena = (size_t)1 << 40;  // addresses, not memory

typedef struct {
  size_t size, room;  // bytes asked for, bytes of the pages that hold them
} Header;             // page of the header, guard page, pages of the block, guard page

static char* arena;
static atomic_size_t used;
static atomic_int mode;  // 0: off, 1: blocks end at a guard page, 2: blocks begin at one

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static void fail(const char* message) {
  (void)!write(2, message, strlen(message));
  _exit(99);
}

static int guarded(const void* block) {
  return arena && (const char*)block >= arena && (const char*)block < arena + kArena;
}

// A block begins in the first of its pages, whichever end is guarded.
static char* first_page(void* block) { return (char*)((uintptr_t)block & ~(uintptr_t)(kPage - 1)); }
static Header* header_of(void* block) { return (Header*)(first_page(block) - 2 * kPage); }

static void* allocate(size_t size, size_t alignment) {
  const size_t room = (size ? size + kPage - 1 : kPage) / kPage * kPage;
  char* header = arena + atomic_fetch_add(&used, room + 3 * kPage);
  char* first = header + 2 * kPage;
  if (first + room > arena + kArena || mprotect(header, kPage, PROT_READ | PROT_WRITE) ||
      mprotect(first, room, PROT_READ | PROT_WRITE))
    fail("guarded heap: no room\n");
  memset(first, kFill, room);
  *(Header*)header = (Header){size, room};
  return mode == 2 ? first : (char*)((uintptr_t)(first + room - size) & ~(uintptr_t)(alignment - 1));
}

__attribute__((visibility("default"))) void guard(int new_mode) {
  if (!arena) {
    arena = mmap(NULL, kArena, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) fail("guarded heap: no addresses\n");
  }
  mode = new_mode;
}

// For blocks of a smaller alignment than malloc's: they end at the very byte.
__attribute__((visibility("default"))) void* guarded_block(size_t size, size_t alignment) { return allocate(size, alignment); }

void free(void* block) {
  if (!guarded(block)) {
    __libc_free(block);
    return;
  }
  const Header header = *header_of(block);
  char* first = first_page(block);
  for (char* byte = first; byte < first + header.room; ++byte) {
    if (byte == (char*)block) byte += header.size;
    if (byte < first + header.room && *byte != (char)kFill) fail("guarded heap: a block was overrun\n");
  }
  madvise(first, header.room, MADV_DONTNEED);
  mprotect(first - 2 * kPage, header.room + 2 * kPage, PROT_NONE);
}

void* malloc(size_t size) { return mode ? allocate(size, 16) : __libc_malloc(size); }

void* memalign(size_t alignment, size_t size) {
  return mode && alignment <= kPage ? allocate(size, alignment) : __libc_memalign(alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, size_t alignment, size_t size) {
  *block = memalign(alignment, size);
  return *block ? 0 : ENOMEM;
}

void* calloc(size_t count, size_t size) {
  size_t bytes;
  if (!mode || __builtin_mul_overflow(count, size, &bytes)) return __libc_calloc(count, size);
  return memset(allocate(bytes, 16), 0, bytes);
}

void* realloc(void* block, size_t size) {
  if (!mode && !guarded(block)) return __libc_realloc(block, size);
  void* moved = malloc(size);
  if (moved && block) {
    const size_t old = guarded(block) ? header_of(block)->size : malloc_usable_size(block);
    memcpy(moved, block, old < size ? old : size);
    free(block);
  }
  return moved;
}
