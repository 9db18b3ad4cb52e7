// The part of CUDA C++ that our kernels use, for g++. Included before the defines of a program and its source.
#pragma once

#include "machine.h"

typedef decltype(sizeof(0)) size_t;

#define __global__
#define __device__ inline
#define __host__
#define __forceinline__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)
#define __constant__ static const

#define threadIdx (::emulator::here->thread)
#define blockIdx (::emulator::here->block)
#define blockDim (::emulator::here->block_size)
#define gridDim (::emulator::here->grid_size)

#define EMULATED_VECTORS(T, name)                                                             \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                          \
  struct name##3 { T x, y, z; };                                                              \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                                    \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                  \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                          \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(u32, uint)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(u16, ushort)
#undef EMULATED_VECTORS
struct alignas(16) ulonglong2 {
  u64 x, y;
};

// ---- numbers --------------------------------------------------------------------------------------------------------

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline u32 min(int a, u32 b) { return min((u32)a, b); }
inline u32 min(u32 a, int b) { return min(a, (u32)b); }
inline u32 max(int a, u32 b) { return max((u32)a, b); }
inline u32 max(u32 a, int b) { return max(a, (u32)b); }
inline float fminf(float a, float b) { return __builtin_fminf(a, b); }
inline float fmaxf(float a, float b) { return __builtin_fmaxf(a, b); }
inline float fabsf(float a) { return __builtin_fabsf(a); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float erff(float a) { return __builtin_erff(a); }
inline float expf(float a) { return __builtin_expf(a); }
inline float __expf(float a) { return __builtin_expf(a); }
inline float __uint_as_float(u32 bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}
inline u32 __float_as_uint(float f) {
  u32 bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float((u32)bits); }
inline int __float_as_int(float f) { return (int)__float_as_uint(f); }

// ---- bits -----------------------------------------------------------------------------------------------------------

inline int __popc(u32 v) { return __builtin_popcount(v); }
inline int __popcll(u64 v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz((u32)v); }
inline u32 __brev(u32 v) {
  u32 r = 0;
  for (int i = 0; i < 32; i++) r |= ((v >> i) & 1u) << (31 - i);
  return r;
}
// Nibble i of the selector picks byte i; its highest bit is ignored (ptx.cuh's permute does not ignore it).
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = ((u64)b << 32) | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return r;
}
inline u32 __funnelshift_r(u32 low, u32 high, u32 n) { return (u32)((((u64)high << 32) | low) >> (n & 31)); }
inline u32 __funnelshift_l(u32 low, u32 high, u32 n) { return (u32)(((((u64)high << 32) | low) << (n & 31)) >> 32); }
inline u32 __funnelshift_rc(u32 low, u32 high, u32 n) { return n >= 32 ? high : __funnelshift_r(low, high, n); }
inline u32 __funnelshift_lc(u32 low, u32 high, u32 n) { return n >= 32 ? low : __funnelshift_l(low, high, n); }

// ---- memory ---------------------------------------------------------------------------------------------------------

#define EMULATED_LOAD(name)                                    \
  template <class T>                                           \
  inline T name(const T* place) {                              \
    ::emulator::check_aligned(place, sizeof(T), #name);        \
    return *place;                                             \
  }
EMULATED_LOAD(__ldg)
EMULATED_LOAD(__ldcs)
EMULATED_LOAD(__ldcg)
EMULATED_LOAD(__ldca)
#undef EMULATED_LOAD
template <class T>
inline void __stcs(T* place, T value) {
  ::emulator::check_aligned(place, sizeof(T), "__stcs");
  *place = value;
}
template <class T>
inline T atomicAdd(T* place, T value) {
  const T old = *place;
  *place = old + value;
  return old;
}
inline void __threadfence_block() {}
inline void __threadfence() {}

// ---- waiting --------------------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  ::emulator::meet(::emulator::block_scope, 0, "__syncthreads", line, nullptr, nullptr);
}
inline void __syncwarp(u32 mask = 0xffffffffu, int line = __builtin_LINE()) {
  ::emulator::meet(::emulator::warp_scope, mask, "__syncwarp", line, nullptr, nullptr);
}

namespace emulator {

template <class T>
struct Shuffle {
  T value, result;
  int from;  // the lane read; -1: its own
};

template <class T>
void shuffle(void** slots, u32 mask) {
  for (int lane = 0; lane < 32; lane++) {
    Shuffle<T>* own = (Shuffle<T>*)slots[lane];
    if (own == nullptr) continue;
    const int from = own->from < 0 ? lane : own->from;
    if (!((mask >> from) & 1)) fail("a shuffle reads lane %d, which is not in its mask %08x", from, mask);
    own->result = ((Shuffle<T>*)slots[from])->value;
  }
}

inline int lane() { return (int)(here->thread.x & 31); }

template <class T>
T shuffle_from(u32 mask, T value, int from, int width, const char* name, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("%s: width %d is no power of two up to 32", name, width);
  Shuffle<T> slot = {value, value, from};
  meet(warp_scope, mask, name, line, shuffle<T>, &slot);
  return slot.result;
}

struct Vote {
  bool given;
  u32 all;  // bit l: lane l of the mask voted for
};

inline void vote(void** slots, u32) {
  u32 all = 0;
  for (int lane = 0; lane < 32; lane++)
    if (slots[lane] != nullptr && ((Vote*)slots[lane])->given) all |= 1u << lane;
  for (int lane = 0; lane < 32; lane++)
    if (slots[lane] != nullptr) ((Vote*)slots[lane])->all = all;
}

inline u32 ballot(u32 mask, bool given, const char* name, int line) {
  Vote slot = {given, 0};
  meet(warp_scope, mask, name, line, vote, &slot);
  return slot.all;
}

}  // namespace emulator

template <class T>
inline T __shfl_sync(u32 mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::emulator::lane(), from = (lane & ~(width - 1)) | (source & (width - 1));
  return ::emulator::shuffle_from(mask, value, from, width, "__shfl_sync", line);
}
template <class T>
inline T __shfl_xor_sync(u32 mask, T value, int bits, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::emulator::lane(), from = lane ^ bits;
  const bool inside = from <= (lane | (width - 1));
  return ::emulator::shuffle_from(mask, value, inside ? from : -1, width, "__shfl_xor_sync", line);
}
template <class T>
inline T __shfl_down_sync(u32 mask, T value, u32 by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::emulator::lane(), from = lane + (int)by;
  const bool inside = from <= (lane | (width - 1));
  return ::emulator::shuffle_from(mask, value, inside ? from : -1, width, "__shfl_down_sync", line);
}
template <class T>
inline T __shfl_up_sync(u32 mask, T value, u32 by, int width = 32, int line = __builtin_LINE()) {
  const int lane = ::emulator::lane(), from = lane - (int)by;
  const bool inside = from >= (lane & ~(width - 1));
  return ::emulator::shuffle_from(mask, value, inside ? from : -1, width, "__shfl_up_sync", line);
}
inline u32 __ballot_sync(u32 mask, int given, int line = __builtin_LINE()) {
  return ::emulator::ballot(mask, given != 0, "__ballot_sync", line);
}
inline int __any_sync(u32 mask, int given, int line = __builtin_LINE()) {
  return ::emulator::ballot(mask, given != 0, "__any_sync", line) != 0;
}
inline int __all_sync(u32 mask, int given, int line = __builtin_LINE()) {
  return ::emulator::ballot(mask, given != 0, "__all_sync", line) == mask;
}
