// Shared memory and copies in the background; what the compiler's checks call.

#include <cstring>

#include "state.h"

namespace emulator {

u8* shared_base() { return machine.shared[machine.current->rank].start; }

constexpr u32 FIRST_ADDRESS = 1024;  // so that an offset is never taken for an address

u32 shared_to_address(const void* place) {
  const Guarded& own = machine.shared[machine.current->rank];
  if (!own.holds((const u8*)place)) fail("shared_address of a place that is not in this block's shared memory");
  return FIRST_ADDRESS + (u32)((const u8*)place - own.start);
}

u8* cluster_place(u32 address, u32 bytes, u32 alignment, u32 rank, const char* who) {
  if (rank >= machine.blocks) fail("%s: block %u of a cluster of %u", who, rank, machine.blocks);
  if (rank != machine.current->rank && machine.alive[rank] == 0)
    fail("%s: block %u of the cluster has ended; wait_cluster before it does", who, rank);
  const Guarded& memory = machine.shared[rank];
  const long offset = (long)address - FIRST_ADDRESS;
  if (offset < 0 || offset + (long)bytes > (long)memory.bytes)
    fail("%s: bytes %ld to %ld of the %zu bytes of shared memory", who, offset, offset + (long)bytes, memory.bytes);
  if (offset % alignment != 0) fail("%s: byte %ld of shared memory is not aligned to %u", who, offset, alignment);
  return memory.start + offset;
}

u8* shared_place(u32 address, u32 bytes, u32 alignment, const char* who) {
  return cluster_place(address, bytes, alignment, machine.current->rank, who);
}

void check_aligned(const void* place, u32 alignment, const char* who) {
  if ((size_t)place % alignment != 0) fail("%s: the address is not a multiple of %u", who, alignment);
}

void copy_later(u32 shared, const void* global, int valid, const char* who) {
  u8* const to = shared_place(shared, 16, 16, who);
  if (valid < 0 || valid > 16) fail("%s: %d valid bytes of 16", who, valid);
  check_aligned(global, 16, who);
  const u8* const from = (const u8*)global;
  for (int i = 0; i < valid; i += 15) (void)*(const volatile u8*)(from + i);  // traps here, at the copy at fault
  memset(to, 0xff, 16);
  machine.current->copies.push_back({to, from, (u32)valid, machine.current->closed_groups});
}

void close_copies() { machine.current->closed_groups++; }

void finish_copies(int pending) {
  Fiber* const own = machine.current;
  size_t done = 0;
  for (; done < own->copies.size(); done++) {
    const Copy& copy = own->copies[done];
    if ((long)copy.group >= (long)own->closed_groups - pending) break;
    memcpy(copy.to, copy.from, copy.valid);
    memset(copy.to + copy.valid, 0, 16 - copy.valid);
  }
  own->copies.erase(own->copies.begin(), own->copies.begin() + (long)done);
}

}  // namespace emulator

// What -fsanitize calls: the place in the source comes first in every record.
struct SourcePlace {
  const char* file;
  u32 line, column;
};
#define UNDEFINED(name, what)                                                                      \
  extern "C" [[noreturn]] void __ubsan_handle_##name(SourcePlace* place, u64, u64) {               \
    emulator::fail("%s at %s:%u", what, place->file, place->line);                                 \
  }
UNDEFINED(type_mismatch_v1, "a misaligned or null address")
UNDEFINED(out_of_bounds, "an index outside a local array")
UNDEFINED(shift_out_of_bounds, "a shift by a negative count or by the whole width")
UNDEFINED(add_overflow, "a signed sum that overflows")
UNDEFINED(sub_overflow, "a signed difference that overflows")
UNDEFINED(mul_overflow, "a signed product that overflows")
UNDEFINED(negate_overflow, "a signed negation that overflows")
UNDEFINED(divrem_overflow, "a division by zero")
