// Fibers: one stack for each CUDA thread, kept from launch to launch. Started by makecontext, changed by _setjmp and
// _longjmp, which unlike swapcontext make no system call.
#pragma once

#include <csetjmp>
#include <cstddef>
#include <cstdlib>
#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <vector>

#include "machine.h"

namespace emulator {

constexpr size_t STACK_BYTES = 192 << 10, PAGE = 4096;

struct Copy {
  u8* to;
  const u8* from;
  u32 valid;
  u32 group;
};

struct Fiber {
  Position position;
  u32 linear;  // thread in its block
  u32 rank;    // block in its cluster
  bool exited;
  const char* waits_for;
  int line;
  bool (*ready)(void*);
  void* ready_context;
  std::vector<Copy> copies;
  u32 closed_groups;

  u8* stack;
  bool made;  // its stack holds a loop that waits for the next kernel
  ucontext_t start;
  jmp_buf place;
};

// Stacks with an unmapped page below each.
inline u8* new_stack() {
  void* memory = mmap(nullptr, STACK_BYTES + PAGE, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) abort();
  mprotect(memory, PAGE, PROT_NONE);
  return (u8*)memory + PAGE;
}

// Bytes that end where memory that must not be touched begins (and begin after such): a wrong address traps.
// `start` has the residue `residue` of 1024; what is left over around it is 0xFF and checked at the end.
struct Guarded {
  u8* region = nullptr;
  size_t region_bytes = 0, usable_bytes = 0;
  u8* start = nullptr;
  size_t bytes = 0;

  static constexpr size_t FENCE = 16 << 20;

  void make(size_t wanted, size_t residue, size_t modulus) {
    bytes = wanted;
    usable_bytes = (wanted + modulus + PAGE - 1) / PAGE * PAGE;
    region_bytes = usable_bytes + 2 * FENCE;
    void* memory = mmap(nullptr, region_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) abort();
    region = (u8*)memory;
    mprotect(region + FENCE, usable_bytes, PROT_READ | PROT_WRITE);
    u8* const end = region + FENCE + usable_bytes;
    start = end - wanted;
    start -= ((size_t)start - residue) % modulus;
    __builtin_memset(region + FENCE, 0xff, usable_bytes);
  }
  bool holds(const u8* place, size_t count = 0) const { return place >= start && place + count <= start + bytes; }
  // A place that is this memory's or within its fences.
  bool near(const u8* place) const { return region != nullptr && place >= region && place < region + region_bytes; }
  const u8* changed_edge() const {
    for (const u8* p = region + FENCE; p < start; p++)
      if (*p != 0xff) return p;
    for (const u8* p = start + bytes; p < region + FENCE + usable_bytes; p++)
      if (*p != 0xff) return p;
    return nullptr;
  }
  void free() {
    if (region != nullptr) munmap(region, region_bytes);
    region = nullptr;
  }
};

}  // namespace emulator
