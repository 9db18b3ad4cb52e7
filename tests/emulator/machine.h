// A GPU in one CPU thread: what kernels compiled by tests/emulated.py call. No standard headers, so that a kernel's
// defines cannot change them. waiting.cpp, memory.cpp and launch.cpp hold the implementation.
//
// Every CUDA thread is a fiber. Fibers change only where threads wait for each other, in an order drawn from a seed that
// favours one warp over the others, so that a missing barrier shows as NaN (shared memory starts as 0xFF) or stale data.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

namespace emulator {

struct Index {
  u32 x, y, z;
};

// Where the running fiber is: CUDA's own four words.
struct Position {
  Index thread, block, block_size, grid_size;
};
extern const Position* here;

// Stop the launch with "block (x, y, z), thread t: " and this text.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---- memory ---------------------------------------------------------------------------------------------------------

// The block's dynamic shared memory: exactly as many bytes as asked for at launch, 1024-byte aligned.
u8* shared_base();
// A place in it as a 32-bit address, and back: fails unless `bytes` from there lie inside and it is so aligned.
u32 shared_to_address(const void* place);
u8* shared_place(u32 address, u32 bytes, u32 alignment, const char* who);
// The same in block `rank` of the cluster; fails once that block has ended.
u8* cluster_place(u32 address, u32 bytes, u32 alignment, u32 rank, const char* who);

// A copy in the background: `valid` bytes and zeros up to 16. The destination is 0xFF from here to the wait, which does
// the copy, as late as the hardware may.
void copy_later(u32 shared, const void* global, int valid, const char* who);
void close_copies();
void finish_copies(int pending);

void check_aligned(const void* place, u32 alignment, const char* who);

// ---- waiting --------------------------------------------------------------------------------------------------------

enum Scope { warp_scope, warpgroup_scope, block_scope, cluster_scope };

// slots[i] is what member i of the scope passed as `slot` (null for members outside `mask`).
typedef void (*Compute)(void** slots, u32 mask);

// Wait for all members of the scope (for warp_scope those in `mask`, none of which may have exited; for block_scope and cluster_scope all
// that have not exited) to come here: the same name, line, mask and computation. The last one computes for all.
void meet(Scope scope, u32 mask, const char* name, int line, Compute compute, void* slot);

// Wait until ready(context), which other threads make true.
void wait_until(const char* name, int line, bool (*ready)(void*), void* context);

// ---- launching ------------------------------------------------------------------------------------------------------

enum Kind { number_kind, read_kind, write_kind, unknown_kind };  // int32; const pointer; pointer; a type that the launcher cannot pass

struct Memory {
  u8* start;
  u64 bytes;
};

struct Launch {
  Index grid, cluster;
  u32 threads, shared_bytes;
  u64 seed;
  u32 count;            // arguments
  const u64* values;    // a number, or an address in one of `memories`, or 0
  const int* tensor;    // 0: a number, 1: a tensor (or null), 2: a tensor that may be filled with 0xFF if written
  const u64* extents;   // bytes behind each tensor's address
  u32 memory_count;
  const Memory* memories;
  char* error;          // 1024 bytes
};

typedef void (*Invoke)(const u64* values);

// 0, or 1 with the reason in launch.error.
int run(const Launch& launch, Invoke invoke, const int* kinds, u32 count);

// ---- from a kernel's signature to Invoke ----------------------------------------------------------------------------

template <int... I>
struct Indices {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  typedef Indices<I...> type;
};

template <class T>
struct Parameter {
  static constexpr int kind = unknown_kind;
  static T read(u64) { return T(); }
};
template <>
struct Parameter<int> {
  static constexpr int kind = number_kind;
  static int read(u64 value) { return (int)value; }
};
template <>
struct Parameter<u32> {
  static constexpr int kind = number_kind;
  static u32 read(u64 value) { return (u32)value; }
};
template <class T>
struct Parameter<T*> {
  static constexpr int kind = write_kind;
  static T* read(u64 value) { return (T*)value; }
};
template <class T>
struct Parameter<const T*> {
  static constexpr int kind = read_kind;
  static const T* read(u64 value) { return (const T*)value; }
};

template <auto Function>
struct Entry;
template <class... A, void (*Function)(A...)>
struct Entry<Function> {
  static constexpr u32 count = sizeof...(A);
  static constexpr int kinds[sizeof...(A) + 1] = {Parameter<A>::kind..., 0};
  template <int... I>
  static void call(const u64* values, Indices<I...>) {
    Function(Parameter<A>::read(values[I])...);
  }
  static void invoke(const u64* values) { call(values, typename Count<(int)sizeof...(A)>::type()); }
};

}  // namespace emulator
