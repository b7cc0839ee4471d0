/* An allocator that catches accesses outside of what was allocated, for convolution_faults.py. Linux, x86-64.
 *
 * Between guard_on() and guard_check() every aligned allocation, as those of tensors and of oneDNN's buffers
 * are, ends at a page without access. A write to it is noted and let through; so is a read. What lies between
 * an allocation's end and that page (its size is rounded up to its alignment), and before its start, is
 * filled with a pattern that is compared when it is freed, and by guard_check(). What is freed may not be
 * accessed, either, and its addresses are not used again. Otherwise it is the C library's allocator. */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { PAGE = 4096, MOST = 4000000, PATTERN = 0xA5 };
static const size_t ARENA = (size_t)1 << 38; /* of addresses, not of memory */

typedef struct {
  unsigned char *first, *start, *guard; /* its pages (NULL: freed), itself, the page without access behind it */
  size_t size;
} Block;

static Block blocks[MOST];
static unsigned char *arena, *next;
static int count, on;
static long writes, reads;
extern void *__libc_malloc(size_t), *__libc_realloc(void*, size_t), *__libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static size_t up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

static int is_guarded(const void* p) {
  return arena && (const unsigned char*)p >= arena && (const unsigned char*)p < next;
}

static void* guarded(size_t alignment, size_t size) {
  if (alignment < 16) alignment = 16;
  size_t taken = up(size ? size : 1, alignment), whole = up(taken, PAGE);
  if (alignment > PAGE) return NULL;
  if (count == MOST || next + whole + PAGE > arena + ARENA || mprotect(next, whole, PROT_READ | PROT_WRITE))
    __builtin_trap(); /* to go on unguarded would be to find nothing */
  memset(next, PATTERN, whole);
  Block block = {next, next + whole - taken, next + whole, size};
  next += whole + PAGE;
  blocks[count++] = block;
  return block.start;
}

static void on_fault(int signum, siginfo_t* info, void* context) {
  if (!is_guarded(info->si_addr)) { /* a fault of another kind ends the process when it comes again */
    signal(signum, SIG_DFL);
    return;
  }
  int writing = (int)((ucontext_t*)context)->uc_mcontext.gregs[REG_ERR] & 2;
  *(writing ? &writes : &reads) += 1;
  void* page = (void*)((uintptr_t)info->si_addr / PAGE * PAGE);
  mprotect(page, PAGE, writing ? PROT_READ | PROT_WRITE : PROT_READ);
}

void guard_on(void) {
  if (arena == NULL) {
    arena = mmap(NULL, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) __builtin_trap();
    next = arena + PAGE;
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSEGV, &action, NULL);
  }
  writes = reads = 0, on = 1;
}

static void check(const Block* block) {
  for (unsigned char* p = block->first; p < block->start; p++) writes += *p != PATTERN;
  for (unsigned char* p = block->start + block->size; p < block->guard; p++) writes += *p != PATTERN;
}

/* What was seen since guard_on(): 1 for writes outside of an allocation, 2 for reads of the page behind it. */
int guard_check(void) {
  on = 0;
  for (Block* block = blocks; block < blocks + count; block++)
    if (block->first) check(block);
  return (writes ? 1 : 0) | (reads ? 2 : 0);
}

void* memalign(size_t alignment, size_t size) {
  void* made = on ? guarded(alignment, size) : NULL;
  return made ? made : __libc_memalign(alignment, size);
}

void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** made, size_t alignment, size_t size) {
  *made = memalign(alignment, size);
  return *made ? 0 : ENOMEM;
}

static Block* block_at(void* pointer) { /* their addresses rise */
  int low = 0, high = count;
  while (high - low > 1) {
    int middle = (low + high) / 2;
    *(blocks[middle].start <= (unsigned char*)pointer ? &low : &high) = middle;
  }
  return blocks + low;
}

void free(void* pointer) {
  if (!is_guarded(pointer)) {
    __libc_free(pointer);
    return;
  }
  Block* block = block_at(pointer);
  check(block);
  size_t whole = block->guard - block->first;
  madvise(block->first, whole, MADV_DONTNEED);
  mprotect(block->first, whole + PAGE, PROT_NONE);
  block->first = NULL;
}

void* realloc(void* pointer, size_t size) {
  if (!is_guarded(pointer)) return __libc_realloc(pointer, size);
  size_t before = block_at(pointer)->size;
  void* made = __libc_malloc(size);
  if (made == NULL) return NULL;
  memcpy(made, pointer, size < before ? size : before);
  free(pointer);
  return made;
}
